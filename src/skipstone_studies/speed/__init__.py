"""Timings, which make no run: models with random weights beside each other, and beside transformers' own."""

from __future__ import annotations

from skipstone_studies.speed.decode import DECODE
from skipstone_studies.speed.decoder import DECODER
from skipstone_studies.speed.experts import EXPERTS
from skipstone_studies.speed.ffn_groups_cost import FFN_GROUPS_COST
from skipstone_studies.speed.full_size import FULL_SIZE
from skipstone_studies.speed.head_loss import HEAD_LOSS
from skipstone_studies.speed.mod_training import MOD_TRAINING
from skipstone_studies.speed.neurons_decode import NEURONS_DECODE
from skipstone_studies.speed.parity import PARITY
from skipstone_studies.speed.polyglu_cost import POLYGLU_COST
from skipstone_studies.speed.static_graph import STATIC_GRAPH
from skipstone_studies.speed.tsa_speed import TSA_SPEED

STEPS = (MOD_TRAINING, POLYGLU_COST, FFN_GROUPS_COST, EXPERTS, HEAD_LOSS, STATIC_GRAPH, FULL_SIZE)
DECODING = (DECODE, TSA_SPEED, NEURONS_DECODE)
TIMINGS = (PARITY, DECODER, *STEPS, *DECODING)
