"""Collects what a whole answer holds. It knows neither HTTP nor the answer's JSON."""

from pagebus.gateway.generation_events import PromptEvent, TextEvent
from pagebus.gateway.jobs import Job, PromptTeller
from pagebus.gateway.shapes import ChoiceAnswer


class WholeAnswer:
    """Grows by a job's events; `choices` is complete when all generations are over."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._teller = PromptTeller(job)
        self.choices: list[ChoiceAnswer] = []
        for index, prompt in enumerate(self._teller.prompts):
            for _ in job.choices_of(index):
                choice = ChoiceAnswer(prompt)
                if job.echoes:
                    choice.texts.append(job.echoes[index].text)
                choice.logprobs += self._teller.echoed[index]
                self.choices.append(choice)

    def on_prompt(self, prompt: int, event: PromptEvent) -> None:
        """Log-probabilities of a prompt."""
        self._teller.take(prompt, event)
        if echoed := self._teller.echoed[prompt]:
            for choice in self._job.choices_of(prompt):
                self.choices[choice].logprobs.append(echoed[-1])

    def on_text(self, event: TextEvent) -> None:
        """News of a choice."""
        if self._job.is_echo_only:
            return
        choice = self.choices[event.choice]
        choice.texts.append(event.text)
        choice.ids += event.ids
        logprobs = self._job.shape.logprobs_of(event, self._job.num_before(event.choice))
        if logprobs is not None:
            choice.logprobs.append(logprobs)
        if event.finish_reason is not None:
            choice.reason = event.finish_reason
