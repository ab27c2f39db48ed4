"""Gemma's tokenizer, as a SentencePiece model built from the GGUF file's vocabulary."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .errors import damaged
from .gguf_file import GGUFFile, missing_extra

try:
    import sentencepiece
except ImportError as error:
    raise missing_extra(error.name) from error


BPE = 2  # TrainerSpec.ModelType
UNKNOWN, USER_DEFINED = 2, 4  # ModelProto.SentencePiece.Type


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a protocol buffer: varint, float32, or bytes with their length in front.

    Written here because the classes that sentencepiece ships load with one major version of protobuf only. The numbers are
    those of sentencepiece_model.proto: ModelProto is pieces = 1 (piece = 1, score = 2, type = 3), trainer_spec = 2,
    normalizer_spec = 3.
    """
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


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
        proto = bytearray()
        kinds = list(types)
        kinds[unk_id] = UNKNOWN  # Gemma's file calls it a control piece.
        for piece, score, kind in zip(pieces, scores, kinds, strict=True):
            # GGUF writes the runs of spaces, which are user-defined pieces, with plain spaces; the others with U+2581.
            text = piece.replace(" ", "\u2581") if kind == USER_DEFINED else piece
            proto += _field(1, _field(1, text) + _field(2, float(score)) + _field(3, int(kind)))
        trainer = _field(3, BPE) + _field(4, len(pieces)) + _field(35, True)  # model_type, vocab_size, byte_fallback
        for number, index in enumerate((unk_id, bos_id, eos_id, pad_id)):
            trainer += _field(40 + number, index) + _field(45 + number, pieces[index])  # unk_id and unk_piece, ...
        # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
        normalizer = _field(1, "identity") + _field(3, add_space_prefix) + _field(4, False) + _field(5, True)
        proto += _field(2, trainer) + _field(3, normalizer)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=bytes(proto))
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
