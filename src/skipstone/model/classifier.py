"""A head that puts a whole text into classes, on the last token's state."""

from __future__ import annotations

from transformers import AutoModelForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from skipstone.model.config import SkipstoneConfig
from skipstone.model.decoder import SkipstonePreTrainedModel


class SkipstoneForSequenceClassification(GenericForSequenceClassification, SkipstonePreTrainedModel):
    """`config.num_labels` scores [B, labels] of each text, read where it ends, by transformers' own generic head.

    Texts of a batch are told from padding by `config.pad_token_id`. The loss is that of the labels alone: routers get
    gradients through what they weigh, not their auxiliary losses. `routing` and the decoder's other arguments pass
    through.
    """


AutoModelForSequenceClassification.register(SkipstoneConfig, SkipstoneForSequenceClassification, exist_ok=True)
