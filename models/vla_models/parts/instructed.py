"""What a policy does with its instruction before a chunk: say a subtask in its place (pi0.5, arXiv 2504.16054), and
read it a second time without the advantage (pi0.6, arXiv 2511.14759). Nothing here needs torch: both runtimes do it
alike.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from abc import abstractmethod

import numpy as np

from vla_models.answering import Step
from vla_models.policy import InferenceRequest, ModelInputs, Policy, PolicyError, PolicyObservation, PolicyOutput
from vla_models.preprocess import Processor
from vla_models.tokenizer import TokenizerError
from vla_models.tokenizers import TextAnswer, decode_answer


class InstructedPolicy(Policy):
    """A policy whose network can say what to do next; `infer` then acts on that."""

    #: The subtask that is said before each chunk; None: the instruction is followed as it is.
    talk: TextAnswer | None = None
    #: What the language head reads when it is asked for the subtask, as PolicySpec.prompt.
    question: str = ""
    #: Prompt of a second reading that the first one is weighed against; empty: there is none.
    plain_prompt: str = ""
    #: The inputs of that reading.
    plain: ModelInputs | None = None

    @abstractmethod
    def ask(self, inputs: ModelInputs) -> tuple[np.ndarray, Step]:
        """Read a prompt, of a batch of one: logits (vocabulary,) of the text's first token, and the step from there."""

    def infer(self, observation: PolicyObservation, request: InferenceRequest | None = None) -> PolicyOutput:
        """The next chunk; with `talk`, for the subtask that the language head says (timings: "subtask")."""
        start = time.perf_counter()
        if self.talk is not None:
            observation = dataclasses.replace(observation, instruction=self.subtask(observation))
        said = time.perf_counter() - start
        self.plain = self.reader(self.plain_prompt).inputs(observation)[0] if self.plain_prompt else None
        out = super().infer(observation, request)
        if self.talk is None:
            return out
        timings = {"subtask": said, **out.timings, "total": said + out.timings["total"]}
        return dataclasses.replace(out, timings=timings)

    def subtask(self, observation: PolicyObservation) -> str:
        """What to do next for the observation's instruction, in the language head's words. Raises PolicyError."""
        logits, step = self.ask(self.asker.inputs(observation)[0])
        try:
            tokens = decode_answer(self.talk, logits, step, np.zeros(self.talk.length), 0.0)
        except TokenizerError as error:
            raise PolicyError(f"policy {self.spec.name}: subtask: {error}") from error
        return self.processor.tokenizer.decode(self.talk.decode(tokens)).strip()

    @property
    def asker(self) -> Processor:
        """Prepares inputs whose prompt asks for the subtask."""
        return self.reader(self.question)

    def reader(self, prompt: str) -> Processor:
        """Prepares inputs with another prompt."""
        reader = copy.copy(self.processor)
        reader.spec = dataclasses.replace(self.spec, prompt=prompt)
        return reader
