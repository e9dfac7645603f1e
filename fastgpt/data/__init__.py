"""From text to batches: corpora, tokenizers, token shards, and the deterministic loader."""

from fastgpt.data.cache import DownloadError, download
from fastgpt.data.corpora import CORPORA, Corpus, Document, open_corpus
from fastgpt.data.loader import IGNORE_INDEX, Batch, Loader, ValidationSet, permute
from fastgpt.data.prefetch import Prefetcher
from fastgpt.data.prepare import prepare, prepared
from fastgpt.data.shards import ShardWriter, TokenDataset, find_shards, is_token_folder, read_shard
from fastgpt.data.tokenizers import (
    TOKENIZER_FILE,
    TOKENIZERS,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    tokenizer_from_json,
)

__all__ = [
    "CORPORA",
    "IGNORE_INDEX",
    "TOKENIZERS",
    "TOKENIZER_FILE",
    "Batch",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "Document",
    "DownloadError",
    "GPT2Tokenizer",
    "Loader",
    "Prefetcher",
    "ShardWriter",
    "TokenDataset",
    "Tokenizer",
    "ValidationSet",
    "download",
    "find_shards",
    "is_token_folder",
    "load_tokenizer",
    "make_tokenizer",
    "open_corpus",
    "permute",
    "prepare",
    "prepared",
    "read_shard",
    "save_tokenizer",
    "tokenizer_from_json",
]
