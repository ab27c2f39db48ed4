"""The commands of ``python -m jaxnorm`` that need typer and rich; ``jaxnorm/cli.py`` lists them."""
