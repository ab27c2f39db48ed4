from .cli import app

app(prog_name="python -m examples.unet_block")
