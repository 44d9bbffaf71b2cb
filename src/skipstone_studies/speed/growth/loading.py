"""Part of the study of growth: memory of loading and converting a large checkpoint, and CPU seconds of imports.

Each is measured in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from skipstone_studies.study import Figures, RecipeDict

IMPORTS = {
    "import transformers": "import transformers",
    "a model class of transformers": "from transformers import LlamaForCausalLM",
    "import skipstone": "import skipstone",
    "a model class of skipstone": "from skipstone import SkipstoneForCausalLM",
}
LLAMA_1B = {  # 1,032 M parameters
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MAKE = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1])))
model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.data.uniform_(-0.02, 0.02)
model.save_pretrained(sys.argv[2])
"""
READ = """
import json, sys
from pathlib import Path
import torch
from skipstone.model.pretrained import convert, load_pretrained
import skipstone_studies.speed.growth.curves  # loads what the measured calls need, before memory is read
from skipstone_studies.speed.resident import resident_bytes, resident_peak
what, source, out = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")
before = resident_bytes()
if what == "converting":
    convert(source, Path(out))
    size = sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))
else:
    model = load_pretrained(source, {"loading": None, "loading as fp32": "float32"}[what])
    for parameter in model.parameters():
        parameter.sum()  # files are mapped: read every page
    size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"size": size, "peak": resident_peak() - before}))
"""


def memory(recipe: RecipeDict) -> Figures:
    """Measure the peak memory of loading or converting a checkpoint with random weights, in a process of its own.

    recipe: has the keys "checkpoint" (fields of a LlamaConfig) and "what" ("loading", "loading as fp32" or
    "converting"). Keys of the result: `size_mb`, the size of the weights; `peak_mb`, the peak memory, pages of mapped
    files included; `of_size`, peak_mb / size_mb.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        _python(MAKE, json.dumps(recipe["checkpoint"]), str(source))
        told = _python(READ, recipe["what"], str(source), str(Path(folder) / "out"))
    found = json.loads(told.splitlines()[-1])
    return {"size_mb": found["size"] / 1e6, "peak_mb": found["peak"] / 1e6, "of_size": found["peak"] / found["size"]}


def _python(text: str, *words: str) -> str:
    """Run the Python program `text` with the arguments `words`, and return what it printed.

    Raises ValueError with the last line of its error output if it fails.
    """
    ran = subprocess.run([sys.executable, "-c", text, *words], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ValueError((ran.stderr.strip().splitlines() or ["the process failed"])[-1])
    return ran.stdout


def imports(recipe: RecipeDict) -> Figures:
    """Measure the CPU seconds of processes that import a library or a model class, or print the command line's help.

    recipe: its "repeats" is how often each process is run; the least of its times is returned. Keys of the result:
    `imports`, seconds by name of the process; `of_transformers`, seconds of `import skipstone` divided by those of
    `import transformers`; `of_class`, seconds of importing a model class of skipstone divided by those of importing one
    of transformers; `help`, seconds of `skipstone --help`.
    """
    taken: dict[str, list[float]] = {name: [] for name in (*IMPORTS, "skipstone --help")}
    for _ in range(recipe["repeats"]):
        for name, text in IMPORTS.items():
            taken[name].append(_seconds([sys.executable, "-c", text]))
        taken["skipstone --help"].append(_seconds([sys.executable, "-m", "skipstone", "--help"]))
    least = {name: min(found) for name, found in taken.items()}
    return {
        "imports": least,
        "of_transformers": least["import skipstone"] / least["import transformers"],
        "of_class": least["a model class of skipstone"] / least["a model class of transformers"],
        "help": least["skipstone --help"],
    }


def _seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def arms() -> dict[str, RecipeDict]:
    """Return the recipes of this part of the study by name: three ways to read a checkpoint, and imports.

    The ways are loading it, loading it as fp32, and converting it; it has a billion random weights.
    """
    reading = {
        f"{what} 1B": {"kind": "memory", "what": what, "checkpoint": LLAMA_1B}
        for what in ("loading", "loading as fp32", "converting")
    }
    return {**reading, "imports": {"kind": "imports", "repeats": 3}}
