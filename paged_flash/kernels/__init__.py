"""The kernels: `reference` (the definition) and `xla` (tiled, any backend).

`arguments` turns a call of a public op into a `problem` (static, hashable) and its arrays. Each kernel exports plain
functions: `supports(problem) -> str` ("" or why not), `forward`, `backward` and `paged_forward`. A kernel knows no
autodiff, no dispatch and no defaults; `paged_flash.attention` chooses.
"""
