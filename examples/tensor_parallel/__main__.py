from .cli import app

app(prog_name="tensor_parallel")
