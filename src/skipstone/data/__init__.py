"""Corpora, tokenizers and rows of token ids for training and evaluation; nothing here knows a model.

corpora.py     the registry of corpora by name, and `load_corpus`; importing it loads neither torch nor NumPy
corpus.py      `Corpus`: named splits of documents, read when they are needed; two ways to split
fetch.py       finds corpus files; the only code that downloads
published.py   corpora that are published files: tiny-shakespeare, wikitext-2, enwik8, gcide
installed.py   corpora made of Python sources installed on this machine
users.py       the user's own corpora: text:PATH, jsonl:PATH, hf:NAME
distinct.py    a corpus without passages that are nearly copied between its splits
tokenizers.py  char, byte and pretrained tokenizers, all of them Hugging Face's
encode.py      documents to token ids, fast where the tokenizer allows it
ids.py         arrays of token ids, in memory or concatenated from files
draws.py       random numbers as a function of (seed, row, column), in any order
rows.py        the base class of map-style datasets, and `collate`
packing.py     token ids to rows: random windows for training, every token once for evaluation
streams.py     streams of documents, for corpora that do not fit into memory
sharding.py    `write_shards`: tokenised documents on disk, with a manifest; resumes an interrupted call
shards.py      reads shards by memory mapping
blend.py       rows from several sources, in shares that change during training
synthetic.py   Reset-S3: synthetic rows that mark the tokens that need depth
switched.py    Switched-S3: such rows in which no token shows by itself whether it needs depth
mixed.py       text with spans of Switched-S3
sequences.py   the copy and sort tasks
config.py      `DataConfig`: the data of a run, checked without loading torch
prepare.py     `prepare`: all of the above in one call
"""
