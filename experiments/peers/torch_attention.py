"""Attention by PyTorch and by packages for it, in a process of its own: one profiler at a time reads a process' GPU.

Started by experiments.attention. Answers every line of its standard input, a JSON object with "ask", with one line:
"versions" -> {name: version}; "load" with "case" (fields of a Case), "dtype", "stage", "peer" -> {"worst": its error by
what is allowed}; "time" with "peer", "repeats" -> {"seconds": [...]}, of GPU kernels; "clear" -> {}. Any failure is
{"error": one line}.
"""

import importlib.metadata
import json
import sys

try:
  import torch
  from torch.nn.attention import SDPBackend, sdpa_kernel
  from torch.nn.functional import scaled_dot_product_attention
except ImportError:
  torch = None


def cudnn(case, query, key, value):
  return _sdpa("CUDNN_ATTENTION", case, query, key, value)


def fa2(case, query, key, value):
  return _sdpa("FLASH_ATTENTION", case, query, key, value)


def _sdpa(backend, case, query, key, value):
  with sdpa_kernel(getattr(SDPBackend, backend)):
    return scaled_dot_product_attention(query, key, value, is_causal=case["is_causal"], enable_gqa=True)


def fa4(case, query, key, value):
  from flash_attn.cute import flash_attn_func

  out = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=case["is_causal"])
  return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


PEERS = {"torch_cudnn": cudnn, "torch_fa2": fa2, "fa4": fa4}
# FlashAttention-4 takes [B, T, H, D], the others [B, H, T, D]: each gets its own layout contiguous.
SEQUENCE_FIRST = {"fa4"}
calls = {}


def make_inputs(case, dtype, peer):
  """(query, key, value, cotangent), standard normal, [B, H, T, D] by their shape."""
  generator = torch.Generator("cuda").manual_seed(0)
  heads = (case["num_heads"], case["num_kv_heads"], case["num_kv_heads"], case["num_heads"])
  shape = (case["batch"], case["seq_len"])
  made = [torch.randn(*shape, h, case["head_dim"], generator=generator, device="cuda").to(dtype) for h in heads]
  made = [x.transpose(1, 2) for x in made]
  return [x if peer in SEQUENCE_FIRST else x.contiguous() for x in made]


def plain(query, key, value, cotangent, is_causal, dtype):
  """Attention with the whole score matrix, and its gradients, computed in `dtype`: query [G, T, D], key [T, D]."""
  query, key, value = (x.detach().to(dtype).requires_grad_() for x in (query, key, value))
  scores = (query @ key.T) * query.shape[-1] ** -0.5
  if is_causal:
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu(1)
    scores = scores.masked_fill(future, float("-inf"))
  out = scores.float().softmax(-1).to(dtype) @ value
  return [x.float().detach() for x in (out, *torch.autograd.grad(out, (query, key, value), cotangent.to(dtype)))]


def worst_error(case, inputs, results):
  """As `worst_error` of experiments.attention_cases, of the first KV head of the first row."""
  group = case["num_heads"] // case["num_kv_heads"]
  slices = (slice(0, group), 0, 0, slice(0, group))
  operands = [x[0, pick] for x, pick in zip(inputs, slices, strict=True)]
  exact = plain(*operands, case["is_causal"], torch.float32)
  rounded = plain(*operands, case["is_causal"], inputs[0].dtype)
  worst = 0.0
  for result, right, near, pick in zip(results, exact, rounded, (slices[0], *slices[:3]), strict=False):
    allowed = 2 * (near - right).abs().max() + torch.finfo(inputs[0].dtype).eps * right.abs().max()
    error = (result[0, pick].float() - right).abs().max()
    worst = max(worst, float(error / allowed) if torch.isfinite(result).all() else float("inf"))
  return min(worst, 1e9)


def load(case, dtype, stage, peer):
  inputs = make_inputs(case, getattr(torch, dtype), peer)
  query, key, value = (x.detach().requires_grad_(stage != "forward") for x in inputs[:3])

  def call():
    out = PEERS[peer](case, query, key, value)
    return (out,) if stage == "forward" else (out, *torch.autograd.grad(out, (query, key, value), inputs[3]))

  worst = worst_error(case, inputs, call())
  torch.cuda.empty_cache()
  calls[peer] = call
  return {"worst": worst}


def kernel_seconds(call, repeats):
  """Seconds of the GPU kernels of each call; copies and fills that are no kernels are not counted."""
  call()
  torch.cuda.synchronize()
  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
    for _ in range(repeats):
      call()
    torch.cuda.synchronize()
  kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
  kernels = [event for event in kernels if not event.name.startswith(("Memcpy", "Memset"))]
  kernels.sort(key=lambda event: event.time_range.start)
  if not kernels or len(kernels) % repeats:
    raise RuntimeError(f"{len(kernels)} kernels in {repeats} calls")
  each = len(kernels) // repeats
  micros = [event.time_range.elapsed_us() for event in kernels]
  return [1e-6 * sum(micros[i * each : (i + 1) * each]) for i in range(repeats)]


def versions():
  found = {}
  for name in ("torch", "flash-attn-4"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  if torch is not None and torch.cuda.is_available():
    found["cudnn of torch"] = str(torch.backends.cudnn.version())
  return found


def answer(ask, **what):
  if ask == "versions":
    return versions()
  if torch is None or not torch.cuda.is_available():
    raise RuntimeError("PyTorch is not installed, or sees no GPU")
  if ask == "load":
    return load(**what)
  if ask == "time":
    return {"seconds": kernel_seconds(calls[what["peer"]], what["repeats"])}
  calls.clear()
  torch.cuda.empty_cache()
  return {}


for line in sys.stdin:
  try:
    reply = answer(**json.loads(line))
  except Exception as error:  # the parent reports it in the peer's row
    reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
  print(json.dumps(reply), flush=True)
