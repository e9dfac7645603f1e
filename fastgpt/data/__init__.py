"""From text to batches: corpora, tokenizers, token shards, and the deterministic loader."""

from fastgpt.data.cache import DownloadError, download
from fastgpt.data.corpora import CORPORA, Corpus, Document, is_hub_name, open_corpus
from fastgpt.data.hub import hub_source
from fastgpt.data.loader import IGNORE_INDEX, Batch, Loader, ValidationSet, permute
from fastgpt.data.prefetch import Prefetcher
from fastgpt.data.prepare import prepare, prepared
from fastgpt.data.shards import ShardWriter, TokenDataset, find_shards, is_token_folder, read_shard
from fastgpt.data.sources import Source, data_files, file_source, text_source
from fastgpt.data.stream import prepare_stream
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
    "Source",
    "TokenDataset",
    "Tokenizer",
    "ValidationSet",
    "data_files",
    "download",
    "file_source",
    "find_shards",
    "hub_source",
    "is_hub_name",
    "is_token_folder",
    "load_tokenizer",
    "make_tokenizer",
    "open_corpus",
    "permute",
    "prepare",
    "prepare_stream",
    "prepared",
    "read_shard",
    "save_tokenizer",
    "text_source",
    "tokenizer_from_json",
]
