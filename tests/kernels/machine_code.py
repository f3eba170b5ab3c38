"""Compiles the Hopper kernels to machine code on any Linux machine, without a GPU, and says what came out.

    python -m tests.kernels.machine_code grad-d64-full paged-int8 --sass --cuda=.cuda

Lowering, which the tests check, ends where the compiler of JAX's CUDA plugin begins. That compiler, and the ptxas that
is linked into it, find what lowering does not: operations and layouts without a translation, registers spilled to
memory, and matrix products that wait for each other (ptxas says "wgmma.mma_async instructions are serialized", and
there are about two WARPGROUP instructions for each HGMMA). They need no GPU where something answers in the place of
NVIDIA's driver, which is what `LIBCUDA` does.

The plugin is that of requirements-cuda13.lock, installed or in a folder (CONTRIBUTING.md). The ptxas that NVIDIA
packages is another one, which gave other spills on the same PTX; it is not used.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import core

import paged_flash as pf
from configs.attention import h200, masks
from experiments.attention_cases import Case
from paged_flash.cache import kv_pages
from paged_flash.cache.page_table import PageCopies
from tests.kernels import mosaic_help, test_flash_sm90, test_paged_sm90

PLUGIN = "jax_plugins/xla_cuda13/xla_cuda_plugin.so"
RUNTIME = "jax_cuda13_plugin/libmosaic_gpu_runtime.so"

# A driver with one Hopper GPU: attributes 75 and 76 are its compute capability, 16 its multiprocessors. Whatever is
# loaded is taken; attribute 8 of a kernel is its shared memory.
LIBCUDA = r"""
#include <stdio.h>
#define ANSWER(name, type, answer) int name(type *result) { *result = answer; return 0; }
#define AGREE(name) int name() { return 0; }
ANSWER(cuDriverGetVersion, int, 13000)
ANSWER(cuDeviceGetCount, int, 1)
ANSWER(cuDeviceGet, int, 0)
ANSWER(cuCtxGetDevice, int, 0)
ANSWER(cuCtxGetCurrent, void *, (void *)8)
ANSWER(cuModuleLoadData, void *, (void *)8)
ANSWER(cuModuleGetFunction, void *, (void *)8)
AGREE(cuInit) AGREE(cuModuleUnload) AGREE(cuLaunchKernelEx) AGREE(cuTensorMapEncodeTiled) AGREE(cuMemcpyHtoDAsync_v2)
int cuGetErrorName(int error, const char **text) { *text = "an error"; return 0; }
int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1;
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute == 8) printf("shared memory: %d bytes\n", value);
  return 0;
}
"""
EXPECTED = re.compile(
  r"^ptxas info *: (\d+ bytes gmem|Compiling entry|Function prop|Used|Compile time)|bytes stack frame|^shared memory:"
)
COUNTED = ("HGMMA", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "STL", "LDL", "MUFU", "SHFL", "BAR")
SHORT = 40  # instructions of a loop that is not worth a line: waiting for a barrier, mostly


# --- compiling --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MachineCode:
  messages: str  # of ptxas, and of the driver's stand-in
  sass: str  # "" without nvdisasm
  seconds: float

  @property
  def warnings(self) -> list[str]:
    """Whatever was said beyond sizes."""
    return [line.strip() for line in self.messages.splitlines() if line.strip() and not EXPECTED.search(line.strip())]

  def size(self, pattern: str) -> str:
    found = re.search(pattern, self.messages)
    return found[1] if found else "0"


@functools.cache
def compiler(cuda: pathlib.Path) -> Callable[[bytes, int], Any]:
  """`MosaicGpuCompile` of the plugin under a folder of packages."""
  tools = cuda / "nvidia/cu13"
  os.environ |= dict(MOSAIC_GPU_CUDA_ROOT=str(tools), MOSAIC_GPU_RUNTIME_LIB_PATH=str(cuda / RUNTIME))
  os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  if (tools / "bin/nvdisasm").exists():
    (tools / "bin/nvdisasm").chmod(0o755)
    os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"
  with tempfile.TemporaryDirectory() as folder:
    library = f"{folder}/libcuda.so.1"
    command = ["cc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-xc", "-", "-o", library]
    subprocess.run(command, input=LIBCUDA, text=True, check=True)
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # the plugin asks for this name, and finds it loaded
  function = ctypes.CDLL(str(cuda / PLUGIN)).MosaicGpuCompile
  function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
  return function


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
  """What the process writes to stdout and stderr, C++ included; in the list once it is over."""
  found: list[str] = []
  with tempfile.TemporaryFile() as file:
    sys.stdout.flush()
    kept = {fd: os.dup(fd) for fd in (1, 2)}
    for fd in kept:
      os.dup2(file.fileno(), fd)
    try:
      yield found
    finally:
      ctypes.CDLL(None).fflush(None)
      for fd, before in kept.items():
        os.dup2(before, fd)
        os.close(before)
      file.seek(0)
      found.append(file.read().decode(errors="replace"))


def kernels(f: Callable, *args: Any) -> list[bytes]:
  """The bytecode of every Mosaic kernel that f calls, in the order of lowering."""
  core.KNOWN_KERNELS.clear()
  mosaic_help.lowered(f, *args)
  return list(core.KNOWN_KERNELS.values())


def compile_kernel(bytecode: bytes, cuda: pathlib.Path) -> MachineCode:
  function, start = compiler(cuda), time.perf_counter()
  with captured() as output:
    done = function(bytecode, len(bytecode))
  messages, _, sass = output[0].partition("\t.target")
  sass, shared, after = sass.partition("shared memory: ")  # the driver is asked last
  if not done or "Used" not in messages:
    raise ValueError(output[0][-4000:])
  return MachineCode(messages + shared + after, sass, time.perf_counter() - start)


# --- machine code -----------------------------------------------------------------------------------------------------


def blocks(sass: str) -> tuple[list[list[str]], list[set[int]]]:
  """The instructions between labels and jumps, and the blocks that may follow each of them."""
  found, labels, regions = [[]], {}, {}
  for line in sass.splitlines():
    if label := re.match(r"(\.L_x_\d+):", line):
      found += [[]] if found[-1] else []
      labels[label[1]] = len(found) - 1
    elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
      found[-1].append(instruction[1])
      if re.search(r"\b(BRA|BRX|EXIT|RET|BSYNC)\b", instruction[1]):
        found.append([])
  for region, label in re.findall(r"BSSY\S* (B\d+), `\((\.L_x_\d+)\)", sass):
    regions.setdefault(region, set()).add(labels[label])
  after = []
  for i, block in enumerate(found):
    last, following = block[-1] if block else "", {i + 1} & set(range(len(found)))
    if jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", last):
      following = {labels[jump[1]]} | (set() if last.startswith("BRA `") else following)
    elif meeting := re.match(r"BSYNC\S* (B\d+)", last):
      following = regions.get(meeting[1], following)
    elif re.match(r"(EXIT|RET|BRX)\b", last):
      following = set()
    after.append(following)
  return found, after


def loops(sass: str) -> tuple[list[str], list[list[str]]]:
  """All instructions, and those of each loop with the loops in it, whatever order ptxas gave the blocks.

  A jump closes a loop if it leads to a block that every path to the jump has passed.
  """
  code, after = blocks(sass)
  before = [{i for i, following in enumerate(after) if j in following} for j in range(len(code))]
  passed = [{0}, *(set(range(len(code))) for _ in code[1:])]
  changed = True
  while changed:
    new = [
      {i}.union(set.intersection(*(passed[j] for j in before[i])) if i and before[i] else ()) for i in range(len(code))
    ]
    changed, passed = new != passed, new
  bodies: dict[int, set[int]] = {}
  for i, following in enumerate(after):
    for head in following & passed[i]:
      body, waiting = bodies.setdefault(head, {head}), [i]
      while waiting:
        if (j := waiting.pop()) not in body:
          body.add(j)
          waiting += before[j]
  return sum(code, []), [sum((code[i] for i in sorted(body)), []) for _, body in sorted(bodies.items())]


def count(code: list[str]) -> str:
  """Instructions, and some of their kinds; of a predicated one, the predicate is not its name."""
  names = [re.sub(r"^@\S+ ", "", instruction) for instruction in code]
  kinds = {kind: sum(name.startswith(kind) for name in names) for kind in COUNTED}
  return ", ".join([f"{len(code):5} instructions", *(f"{many} {kind}" for kind, many in kinds.items() if many)])


# --- cases ------------------------------------------------------------------------------------------------------------


def flash(stage: str, arrays: dict[str, Any], options: dict[str, Any]) -> tuple:
  function = test_flash_sm90.loss if stage == "fwd" else test_flash_sm90.gradients
  return lambda arrays: function(arrays, options), arrays


def timed(stage: str, case: Case) -> tuple:
  """A case of the experiment that times attention."""
  ids, lens = (
    jax.ShapeDtypeStruct((case.batch, case.seq_len), jnp.int32),
    jax.ShapeDtypeStruct((case.batch,), jnp.int32),
  )
  sizes = (case.seq_len, case.seq_len, case.num_heads, case.num_kv_heads, case.head_dim, "bfloat16", {}, case.batch)
  arrays, _ = test_flash_sm90.shapes(*sizes)
  arrays |= dict(segment_ids=ids) if case.segments else {}
  arrays |= dict(query_seq_lengths=lens, key_value_seq_lengths=lens) if case.lengths else {}
  options: dict[str, Any] = dict(is_causal=case.is_causal)
  return flash(stage, arrays, options | (dict(local_window_size=(case.window - 1, 0)) if case.window else {}))


def paged(row: tuple) -> tuple:
  arrays, options = test_paged_sm90.shapes(*row)
  return lambda arrays: pf.paged_attention(**arrays, **options, implementation="sm90"), arrays


def cache(name: str) -> tuple:
  sizes: dict[str, Any] = dict(num_layers=16, num_pages=1000, page_size=16, num_kv_heads=8, head_dim=128)
  kv = jax.eval_shape(lambda: kv_pages.init(**sizes, dtype=jnp.bfloat16))
  if name == "copy":
    pairs = jax.ShapeDtypeStruct((64, 2), jnp.int32)
    return lambda kv, pairs: kv_pages.copy(kv, PageCopies(src=pairs, dst=pairs)), kv, pairs
  new, places = jax.ShapeDtypeStruct((64, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((64,), jnp.int32)
  return lambda kv, new, places: kv_pages.write(kv, 1, new, new, places, places), kv, new, places


def all_cases() -> dict[str, Callable[[], tuple]]:
  """Name -> what makes (function, shapes): what is timed, and what the tests of lowering take."""
  cases = {}
  for stage in ("fwd", "grad"):
    for case in (*h200.get_config().problems, *masks.get_config().problems):
      cases[f"{stage}-{re.sub('[ ,]+', '-', case.name)}"] = functools.partial(timed, stage, case)
    for name, row in test_flash_sm90.CONFIGURATIONS.items():
      arguments = test_flash_sm90.shapes(*row)
      cases[f"{stage}-d{name}"] = functools.partial(flash, stage, *arguments)
  cases |= {f"paged-{name}": functools.partial(paged, row) for name, row in test_paged_sm90.CONFIGURATIONS.items()}
  return cases | {f"cache-{name}": functools.partial(cache, name) for name in ("write", "copy")}


def select(wanted: str, names: list[str]) -> list[str]:
  """The names that hold every word of what is wanted."""
  return [name for name in names if set(wanted.split("-")) <= set(name.split("-"))]


# --- the command ------------------------------------------------------------------------------------------------------


def show(name: str, code: MachineCode, with_loops: bool) -> None:
  sizes = [("registers", r"Used (\d+) registers"), ("bytes of shared memory", r"shared memory: (\d+)")]
  sizes += [(f"bytes of spill {x}", rf"(\d+) bytes spill {x}") for x in ("stores", "loads")]
  print(f"{name}: " + ", ".join(f"{code.size(x)} {what}" for what, x in sizes) + f"; {code.seconds:.1f} s")
  for line in code.warnings:
    print("  !", line)
  if with_loops:
    everything, found = loops(code.sass)
    long = [body for body in found if len(body) >= SHORT or re.search(r"\b(HGMMA|STL|LDL)\b", "\n".join(body))]
    for title, body in (("all", everything), *(("loop", body) for body in long)):
      print(f"  {title:5}{count(body)}")
    print(f"  and {len(found) - len(long)} short loops", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("cases", nargs="*", help="words of a case's name, joined by -; none: lists the names")
  parser.add_argument("--sass", action="store_true", help="counts of instructions, in all and by loop")
  parser.add_argument(
    "--cuda", type=pathlib.Path, help="the folder of the packages; without it, where Python finds them"
  )
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  cases = all_cases()
  if not args.cases:
    print("\n".join(cases))
    return
  folders = [args.cuda] if args.cuda else [pathlib.Path(path) for path in sys.path]
  cuda = next((folder.absolute() for folder in folders if (folder / PLUGIN).exists()), None)
  if cuda is None:
    sys.exit(f"found no {PLUGIN}: CONTRIBUTING.md says how to get it")
  if args.sass and not (cuda / "nvidia/cu13/bin/nvdisasm").exists():
    sys.exit("--sass needs nvidia-cuda-nvdisasm beside the plugin")
  for name in [
    name for wanted in args.cases for name in select(wanted, list(cases)) or sys.exit(f"no case has {wanted}")
  ]:
    function, *shapes = cases[name]()
    found = kernels(function, *shapes)
    for i, bytecode in enumerate(found):
      show(f"{name} {i + 1}/{len(found)}", compile_kernel(bytecode, cuda), args.sass)


if __name__ == "__main__":
  main()
