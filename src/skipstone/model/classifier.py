"""A sequence classifier on the hidden state of the last token."""

from __future__ import annotations

from transformers import AutoModelForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from skipstone.model.config import SkipstoneConfig
from skipstone.model.decoder import SkipstonePreTrainedModel


class SkipstoneForSequenceClassification(GenericForSequenceClassification, SkipstonePreTrainedModel):
    """A classifier of whole texts: `config.num_labels` scores [B, labels], from transformers' generic head.

    The score is read at the last token that is not `config.pad_token_id`. The loss is that of the labels alone, without
    auxiliary losses: routers get gradients only through what they weight. `routing` and the decoder's other arguments
    are passed on.
    """


AutoModelForSequenceClassification.register(SkipstoneConfig, SkipstoneForSequenceClassification, exist_ok=True)
