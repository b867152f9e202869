"""CUDA's general kernels on a layer's tensors: for codecs without tables."""

import torch

from veloxquant import _core
from veloxquant.torch.kernels import CudaKernels


class GeneralKernels(CudaKernels):
    """The codes have the order of files."""

    native = _core.CudaGeneralLayer

    def encode(self, side, x, codes, first_block):
        _core.cuda_general_encode(side.core, side.blob(self.layer.device), x, codes, first_block, self.stream())

    def decode_rows(self, side, codes, first_block, n):
        """fp32, in the codec's coordinates."""
        shape = (codes.shape[0], codes.shape[1], n, side.core.head_dim)
        y = torch.empty(shape, dtype=torch.float32, device=codes.device)
        _core.cuda_general_decode(side.core, side.blob(codes.device), codes, first_block, y, self.stream())
        return y

    def decode_tile(self, side, codes, first_block, n):
        return self.decode_rows(side, codes, first_block, n).clamp_(-65504.0, 65504.0).half()

    def decode(self, side, codes, first_block, n):
        return self.decode_rows(side, codes, first_block, n) @ side.inverse_matrix(codes.device)

    def to_portable(self, side, codes):
        return codes.clone()

    def from_portable(self, side, portable):
        return portable
