"""The kernels: `reference` (the definition), `xla` (tiled, any backend).

Each module exports plain functions: `supports(problem) -> str` ("" or why not), `forward`, `backward` and
`paged_forward`. A kernel knows no autodiff, no dispatch and no defaults; `paged_flash.attention` chooses.
"""
