"""Gemma's tokenizer, as a SentencePiece model built from the GGUF file's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from .gguf_file import GGUFFile, damaged, missing_extra

try:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as model_pb2
except ImportError as error:
    raise missing_extra(error.name) from error


class Tokenizer:
    """Byte-fallback BPE over `pieces`; GGUF's token types are SentencePiece's (1 normal, 2 unknown, 3 control, ...).

    Control pieces such as <start_of_turn> are never read out of text: in a prompt they are ordinary characters.

    Args:
      pieces, scores, types: one entry per token id.
      bos_id, eos_id, unk_id, pad_id: the special ids.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        bos_id: int,
        eos_id: int,
        unk_id: int,
        pad_id: int,
        add_bos: bool = True,
        add_space_prefix: bool = False,
    ) -> None:
        proto = model_pb2.ModelProto()
        Piece = model_pb2.ModelProto.SentencePiece
        user_defined = Piece.Type.USER_DEFINED
        for piece, score, kind in zip(pieces, scores, types, strict=True):
            # GGUF writes the runs of spaces, which are user-defined pieces, with plain spaces; the others with U+2581.
            text = piece.replace(" ", "\u2581") if kind == user_defined else piece
            proto.pieces.append(Piece(piece=text, score=score, type=kind))
        trainer = proto.trainer_spec
        trainer.model_type = model_pb2.TrainerSpec.BPE
        trainer.vocab_size = len(pieces)
        trainer.byte_fallback = True
        trainer.bos_id, trainer.eos_id, trainer.unk_id, trainer.pad_id = bos_id, eos_id, unk_id, pad_id
        for name, index in (("bos", bos_id), ("eos", eos_id), ("unk", unk_id), ("pad", pad_id)):
            setattr(trainer, f"{name}_piece", pieces[index])
        normalizer = proto.normalizer_spec
        normalizer.name = "identity"
        normalizer.add_dummy_prefix = add_space_prefix
        normalizer.remove_extra_whitespaces = False
        normalizer.escape_whitespaces = True
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._prefix = [bos_id] if add_bos else []
        self.eos_id = eos_id

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        if file["tokenizer.ggml.model"] != "llama":
            raise damaged(file.path, f"its tokenizer is {file['tokenizer.ggml.model']!r}, expected 'llama'")
        key = "tokenizer.ggml."
        return cls(
            file[f"{key}tokens"],
            file[f"{key}scores"],
            file[f"{key}token_type"],
            bos_id=file[f"{key}bos_token_id"],
            eos_id=file[f"{key}eos_token_id"],
            unk_id=file[f"{key}unknown_token_id"],
            pad_id=file[f"{key}padding_token_id"],
            add_bos=file.get(f"{key}add_bos_token", True),
            add_space_prefix=file.get(f"{key}add_space_prefix", True),
        )

    def __len__(self) -> int:
        return self._processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, the begin-of-text id first."""
        return self._prefix + self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.DecodeIds(list(ids))
