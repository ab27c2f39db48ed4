"""Public functions, one file per family: signature, docstring, argument checks, and the stages behind them."""
