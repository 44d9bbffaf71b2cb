"""A count of the neurons that decoding by numba code needs, and whether leaving out the others saves time.

To leave out neurons, a step reads weights neuron by neuron, and needs the down projection in a transposed layout. Both
are slower than reading whole matrices. `PAYS` is the largest share of neurons on for which it still saves time,
measured with the shapes of SmolLM2-135M on one thread of a processor with AVX2.
"""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.nn.block import Block
from skipstone.nn.int8 import Int8Linear
from skipstone.nn.magnitude_mlp import MagnitudeMLP

PAYS = {"float": 0.9, "int8": 0.6}
STEPS = 64  # of one token, after which shares are looked at


class NeuronShares:
    """A count of the neurons that decoding steps need in each MLP, which decides whether the others are left out.

    Leaving them out is slower if most are needed, because single neurons are read more slowly than a whole matrix. It
    is then switched off: `MagnitudeMLP.skips` becomes False, and compiled decoding steps compute all neurons of the MLP
    until it is trained or built again. blocks: the blocks whose MLPs are watched.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        mlps = {i: block.mlp for i, block in enumerate(blocks) if isinstance(block.mlp, MagnitudeMLP)}
        self.mlps = {i: mlp for i, mlp in mlps.items() if mlp.skips}
        self.needed, self.tokens, self.steps = dict.fromkeys(self.mlps, 0), dict.fromkeys(self.mlps, 0), 0

    def add(self, stored: Sequence[Sequence[int]]) -> None:
        """Add the counts of one decoding step.

        stored: for each block, numbers of which the first is not used, the second is how many tokens its MLP computed,
        and the third how many neurons these tokens needed.
        """
        for i in self.mlps:
            _, tokens, needed, *_ = stored[i]
            self.tokens[i] += tokens
            self.needed[i] += needed
        self.steps += 1
        if self.steps % STEPS == 0:
            self._look()

    def _look(self) -> None:
        for i, mlp in list(self.mlps.items()):
            if self.tokens[i] < STEPS // 2:
                continue
            kind = "int8" if isinstance(mlp.down_proj, Int8Linear) else "float"
            if self.needed[i] > PAYS[kind] * self.tokens[i] * mlp.up_proj.out_features:
                mlp.skips = False  # seen by the next step, which lays the weights out anew
                del self.mlps[i]
