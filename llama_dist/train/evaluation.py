"""Periodic evaluation of a run on its own data: builds the configured tasks once, runs them on any scorer."""

from __future__ import annotations

from llama_dist.config import RunConfig
from llama_dist.data.sources import open_shards
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.eval.scoring import Replica, Scorer
from llama_dist.eval.tasks import load_choices, multiple_choice, perplexity

Results = dict[str, dict[str, float]]


class Evaluation:
    """The held-out perplexity and multiple-choice benchmarks of a run's config, opened and checked at the start."""

    def __init__(self, run: RunConfig) -> None:
        """Raises UserError for files that are missing or broken, before any training time is spent."""
        self._run = run
        self.tokenizer = load_tokenizer(run.data.tokenizer)
        self._choices = {path: load_choices(path) for path in run.eval.choices}
        self._heldout = None
        if run.eval.perplexity and run.data.heldout is not None:
            self._heldout = open_shards(
                run.data.heldout,
                run.data,
                fingerprint=self.tokenizer.fingerprint,
                vocab_size=run.model.vocab_size,
            )

    def __call__(self, scorer: Scorer, *, replica: Replica) -> Results:
        """Results by task: "heldout" for perplexity, a benchmark's path for multiple choice.

        Collective over the replica's group, whose ranks all get the same results.
        """
        run, shared = self._run, {"batch": self._run.eval.batch, "replica": replica}
        shared |= {"seq_len": run.data.seq_len, "max_samples": run.eval.max_samples}
        results: Results = {}
        if self._heldout is not None:
            results["heldout"] = perplexity(scorer, self._heldout, **shared)
        for path, items in self._choices.items():
            results[path] = multiple_choice(scorer, items, self.tokenizer, **shared)
        return results


def describe(task: str, result: dict[str, float]) -> str:
    """One line for the reader."""
    if "perplexity" in result:
        return (
            f"{task}: loss {result['loss']:.4f} nats/token, perplexity {result['perplexity']:.2f} "
            f"({result['documents']:.0f} documents, {result['tokens']:.0f} tokens)"
        )
    cut = f"; {result['choices_cut']:.0f} choices longer than the model's reach" if result["choices_cut"] else ""
    return (
        f"{task}: accuracy {result['accuracy']:.1%}, by bytes {result['accuracy_norm']:.1%}, by mutual information "
        f"{result['accuracy_mutual_info']:.1%} +- {result['accuracy_mutual_info_stderr']:.1%} "
        f"(chance {result['chance']:.1%}; {result['items']:.0f} questions{cut})"
    )
