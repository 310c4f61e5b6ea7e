"""What is refused although it is well-formed: parameters that exclude each other, and what is not served.

A parameter that would change the answer is never ignored silently. Pure; knows the request's fields alone.
"""

from pagebus.gateway.errors import invalid, unsupported
from pagebus.gateway.openai_types import ChatRequest, CommonRequest, CompletionRequest


def refuse_unserved_chat(request: ChatRequest) -> None:
    """Raises a 400 for what a chat cannot have."""
    _refuse_unserved(request)
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    if request.tools and request.tool_choice != "none":
        raise unsupported("tools", "tool calls are not supported yet; send tool_choice 'none' or no tools")


def refuse_unserved_completion(request: CompletionRequest) -> None:
    """Raises a 400 for what a text completion cannot have."""
    _refuse_unserved(request)
    if request.best_of is not None and request.best_of != request.num_choices:
        raise unsupported("best_of", "best_of is not supported; leave it out and use n")
    if request.suffix:
        raise unsupported("suffix", "suffix is not supported; leave it out")
    if request.max_tokens == 0 and not request.echo:
        raise invalid("max_tokens must be at least 1 (0 only with echo)", "max_tokens")


def _refuse_unserved(request: CommonRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is only allowed with stream=true", "stream_options")
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported("response_format", "only response_format of type 'text' is supported yet")
    if any(not stop for stop in request.stop_strings):
        raise invalid("a stop string must not be empty", "stop")
    if request.prompt_logprobs is not None and request.stream:
        raise invalid("prompt_logprobs are not available with stream=true", "prompt_logprobs")
    if request.use_beam_search:
        raise unsupported("use_beam_search", "beam search is not supported; leave use_beam_search out")
    if request.length_penalty not in (None, 1.0):
        raise unsupported("length_penalty", "length_penalty belongs to beam search, which is not supported")
    if request.logprob_token_ids:
        raise unsupported("logprob_token_ids", "logprob_token_ids is not supported; leave it out")
