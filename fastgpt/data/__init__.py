"""From text to batches: corpora, tokenizers, token shards, and the deterministic loader."""

from fastgpt.data.arithmetic import Problem, answer_of
from fastgpt.data.cache import DownloadError, download
from fastgpt.data.corpora import CORPORA, PROBLEM_CORPORA, Corpus, Document, is_hub_name, open_corpus
from fastgpt.data.dataset import Dataset, open_dataset
from fastgpt.data.hub import hub_source
from fastgpt.data.loader import IGNORE_INDEX, Batch, Loader, Samples, ValidationSet, Windows, permute
from fastgpt.data.prefetch import Prefetcher
from fastgpt.data.prepare import prepare, prepared
from fastgpt.data.problems import ProblemSet, problem_set
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
    "PROBLEM_CORPORA",
    "TOKENIZERS",
    "TOKENIZER_FILE",
    "Batch",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "Dataset",
    "Document",
    "DownloadError",
    "GPT2Tokenizer",
    "Loader",
    "Prefetcher",
    "Problem",
    "ProblemSet",
    "Samples",
    "ShardWriter",
    "Source",
    "TokenDataset",
    "Tokenizer",
    "ValidationSet",
    "Windows",
    "answer_of",
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
    "open_dataset",
    "permute",
    "prepare",
    "prepare_stream",
    "prepared",
    "problem_set",
    "read_shard",
    "save_tokenizer",
    "text_source",
    "tokenizer_from_json",
]
