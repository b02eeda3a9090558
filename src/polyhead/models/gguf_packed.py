"""What a GGUF file keeps in blocks where its matrices are to be packed."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.files.gguf_blocks import BY_NAME
from polyhead.files.gguf_pack import PACKERS, pack
from polyhead.files.gguf_types import RawTensor

# llama.cpp keeps these in fp32 whatever the rest is, besides all vectors.
ALWAYS_FLOAT = (".ffn_gate_inp.weight", "position_embd.weight")
# Tables of tokens and heads bear few bits ill.
FINER = ("token_embd.weight", "output.weight")


class Packed(Mapping[str, Tensor | RawTensor]):
    """Tensors by GGUF's names, their matrices in blocks, each packed when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor | RawTensor], kind: str) -> None:
        if kind not in PACKERS:
            raise ConfigError(f"blocks are {kind!r}; use one of {', '.join(PACKERS)}")
        self._tensors, self._kind = tensors, kind

    def __getitem__(self, name: str) -> Tensor | RawTensor:
        tensor = self._tensors[name]
        if isinstance(tensor, RawTensor) or tensor.dim() == 1 or name.endswith(ALWAYS_FLOAT):
            return tensor
        if tensor.shape[-1] % BY_NAME[self._kind].weights:
            return tensor.half()
        return pack(tensor, "Q8_0" if name in FINER else self._kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
