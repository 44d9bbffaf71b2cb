"""All studies by name. A new one is a file in quality/ or speed/ and a line in `FILES`, in whose order they are listed.

Studies are imported when they are needed, so that a mistyped name is reported before torch is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipstone_studies.study import Study

# The file of each study, which defines it under its name in capitals. Studies of losses come first, then timings, which
# train nothing: they compare models with random weights with each other and with transformers' models.
FILES = {
    "demo": "quality.demo",
    "mod_decisions": "quality.mod_decisions",
    "mod_decisions_code": "quality.mod_decisions",
    "headroom": "quality.headroom",
    "headroom_pretrained": "quality.headroom",
    "depth": "quality.depth",
    "decisive": "quality.decisive",
    "decisive_narrow": "quality.decisive",
    "decisive_short": "quality.decisive_short",
    "headroom_short": "quality.headroom_short",
    "reset_s3": "quality.reset_s3",
    "polyglu_routing": "quality.polyglu_routing",
    "ffn_groups": "quality.ffn_groups",
    "exact_zeros": "quality.exact_zeros",
    "released": "quality.released",
    "tsa_shakespeare": "quality.tsa.shakespeare",
    "tsa_controls": "quality.tsa.shakespeare",
    "tsa_enwik8": "quality.tsa.large",
    "tsa_copy_sort": "quality.tsa.copy_sort",
    "tsa_frontier": "quality.tsa.large",
    "tsa_switched_s3": "quality.tsa.known_depth",
    "tsa_mixed": "quality.tsa.mixed",
    "adapt_stories": "quality.adapt_stories",
    "adapt_polyglu": "quality.adapt_polyglu",
    "adapt_frontier": "quality.adapt_frontier",
    "adapt_frontier_mixed": "quality.adapt_frontier",
    "adapt_frontier_neurons": "quality.adapt_frontier",
    "adapt_frontier_distilled": "quality.adapt_frontier",
    "quantised": "quality.quantised",
    "quantised_groups": "quality.quantised",
    "quantised_smollm2": "quality.quantised",
    "sft_stability": "quality.sft_stability",
    "parity": "speed.parity",
    "decoder": "speed.decoder",
    "mod_training": "speed.mod_training",
    "polyglu_cost": "speed.polyglu_cost",
    "ffn_groups_cost": "speed.ffn_groups_cost",
    "throughput": "speed.throughput",
    "experts": "speed.experts",
    "head_loss": "speed.head_loss",
    "static_graph": "speed.static_graph",
    "full_size": "speed.full_size",
    "decode": "speed.decode",
    "tsa_speed": "speed.tsa_speed",
    "neurons_decode": "speed.neurons_decode",
    "decode_rivals": "speed.decode_rivals",
    "decode_rivals_gemma": "speed.decode_rivals",
    "decode_drafts": "speed.decode_drafts",
    "decode_batches": "speed.decode_batches",
    "gpu": "speed.gpu",
    "growth": "speed.growth",
}


class Catalogue(MutableMapping[str, "Study"]):
    """A mapping from the names of studies to the studies, which imports a study when it is first asked for.

    Names are in the order of `FILES`, this module's table of studies. A study that is assigned replaces the one of the
    same name.
    """

    def __init__(self) -> None:
        self._added: dict[str, Study] = {}

    def __getitem__(self, name: str) -> Study:
        if name in self._added:
            return self._added[name]
        module = importlib.import_module(f"skipstone_studies.{FILES[name]}")
        study: Study = getattr(module, name.upper())
        return study

    def __setitem__(self, name: str, study: Study) -> None:
        self._added[name] = study

    def __delitem__(self, name: str) -> None:
        del self._added[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**FILES, **self._added})

    def __len__(self) -> int:
        return len({**FILES, **self._added})


STUDIES = Catalogue()
