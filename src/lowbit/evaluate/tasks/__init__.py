"""Zero-shot and few-shot accuracy through lm-eval: its task definitions on hub data, or the same
prompts on local files.

Source: the Language Model Evaluation Harness (https://github.com/EleutherAI/lm-evaluation-harness),
whose prompts, choice of few-shot examples and scores these are; docs/evaluation.md says where local
files cannot give the same. lm-eval itself is only imported when tasks are prepared.
"""

from .prepare import Prepared, Source, prepare
from .score import TaskResult, TaskResults, evaluate_tasks

__all__ = ["Prepared", "Source", "TaskResult", "TaskResults", "evaluate_tasks", "prepare"]
