"""Timings of this machine, every output verified: `veloxquant bench kernels`, `veloxquant bench attention`."""
