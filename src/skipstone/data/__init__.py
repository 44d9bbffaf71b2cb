"""Floor 3: data. Nothing here imports a model, and naming corpora imports nothing heavy.

corpora.py     the registry: names, what they are, `load_corpus`
corpus.py      a corpus: named splits of documents, read when asked for; the two ways to split
fetch.py       where files are looked for; the only code that downloads
published.py   corpora that are published files: tiny-shakespeare, wikitext-2, enwik8, gcide
installed.py   corpora made of Python sources installed on this machine
users.py       corpora the user brings: text:PATH, jsonl:PATH, hf:NAME
tokenizers.py  char, byte and pretrained tokenizers, all of them Hugging Face's
encode.py      documents -> token ids, fast where the tokenizer allows it
draws.py       random numbers that are a function of (seed, row, column), in any order
rows.py        the map-style dataset every kind of row shares, and `collate`
packing.py     token ids -> rows: random windows to train on, every token once to evaluate on
streams.py     documents one after the other, of corpora that need not fit into memory
sharding.py    `write_shards`: tokenised documents on disk, with their manifest; goes on where it was stopped
shards.py      reading them without loading them
blend.py       rows from several sources, in shares that change while a model trains
synthetic.py   Reset-S3: rows whose needed depth is known
switched.py    the same where no symbol tells by itself whether it needs depth
mixed.py       text with spans of these
sequences.py   the copy and sort tasks
config.py      `DataConfig`: what to train and to evaluate on, checked without loading torch
prepare.py     `prepare`: all of the above in the one call that a trainer makes
"""
