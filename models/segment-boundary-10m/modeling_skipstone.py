from skipstone import SkipstoneConfig, SkipstoneForCausalLM, SkipstoneForSequenceClassification, SkipstoneModel  # noqa: F401
