"""GGUF files as sources: every tensor as transformers loads it, and what is refused by name."""

import json
import shutil

import gguf as package
import helpers
import numpy
import pytest
import torch
from helpers import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.evaluate import load_causal_lm
from lowbit.model.gguf_names import architectures
from lowbit.model.source import open_source
from lowbit.model.stream import ModelStream
