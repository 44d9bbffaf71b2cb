"""A sequence classifier on the hidden state of the last token."""

from __future__ import annotations

from transformers import AutoModelForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from skipstone.model.config import SkipstoneConfig
from skipstone.model.decoder import SkipstonePreTrainedModel


class SkipstoneForSequenceClassification(GenericForSequenceClassification, SkipstonePreTrainedModel):
    """Our decoder in transformers' `GenericForSequenceClassification`: each row gets `config.num_labels` scores.

    The scores, [B, num_labels], are read at the last token of each row that is not `config.pad_token_id`. The loss is
    the labels' loss alone: routers' auxiliary losses are not added, so routers learn only through the weights of
    updates. Further arguments of `forward` go to the decoder: routing ("oracle", "causal", or bool masks [B, T] (rows,
    tokens) of kept tokens by block), noise, executor ("gathered" computes kept tokens only, "masked" all) and
    document_ids.
    """


AutoModelForSequenceClassification.register(SkipstoneConfig, SkipstoneForSequenceClassification, exist_ok=True)
