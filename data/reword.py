"""Asks one question in other words: by a model behind an OpenAI-compatible endpoint, or by fixed English templates.

Knows wordings and how alike two of them are. Does not know files, splits or facts.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from configs.errors import DataError
from data.conversations import normalise

if TYPE_CHECKING:
    import openai

REQUEST_TIMEOUT_S = 60.0
NUM_TRIES = 2
NEAR_DUPLICATE = 0.9  # alike enough that one of two wordings teaches nothing
NEAR_LEAK = 0.8  # alike enough to a held-out wording that its score would no longer tell anything
PROMPT = (
    "Write {count} different ways to ask the question below. Keep its meaning, and every name and number in it. "
    "Write one question a line, with no numbers in front and nothing else.\n\nQuestion: {question}"
)
OPENINGS = (
    "Hi! {same}",
    "Quick question: {same}",
    "Can you help me? {same}",
    "I am new here. {same}",
    "One more thing: {same}",
    "Sorry to ask, but {lower}",
    "Please tell me: {lower}",
    "I would like to know: {lower}",
    "{bare}",
    "{same} Thanks!",
    "For my notes: {lower}",
    "A colleague asked me: {lower}",
)
TURNS = (  # beginnings that can be said in another way, each with its wordings of the rest
    (r"how (?:do|can|would|should) (?:i|you|we) (.+)", ("Tell me how to {0}.", "What is the way to {0}?", "I want to {0}. How?")),
    (r"what (?:is|are) (.+)", ("Can you explain {0}?", "Tell me about {0}.", "Explain {0} to me.", "{0}: what does that mean?")),
    (r"where (?:is|are|do i find|can i find) (.+)", ("In which place is {0}?", "I am looking for {0}.", "Show me where to find {0}.")),
    (r"why (.+)", ("What is the reason that {0}?", "Explain why {0}.")),
    (r"(?:can|may) i (.+)", ("Is it possible to {0}?", "Am I able to {0}?", "Does it let me {0}?")),
)


def likeness(first: str, second: str) -> float:
    """Return how alike two texts are, from 0 to 1: the share of common runs of three characters."""
    ours, theirs = _runs(first), _runs(second)
    return len(ours & theirs) / max(1, len(ours | theirs))


def is_near_any(text: str, others: Iterable[str], limit: float) -> bool:
    """Tell whether `text` is at least so alike to one of the others."""
    return any(likeness(text, other) >= limit for other in others)


def _runs(text: str) -> set[str]:
    words = " ".join(re.findall(r"[^\W_]+", normalise(text)))
    padded = f"  {words} "
    return {padded[at : at + 3] for at in range(len(padded) - 2)}


def reword_by_templates(question: str) -> list[str]:
    """Return other wordings of an English question, the freer ones first."""
    same = question.strip()
    bare = same.rstrip("?!. ")
    # A first letter is made small only where the word is an ordinary one: `How` yes, `GPU` and `I` no.
    lower = same[:1].lower() + same[1:] if re.match(r"[A-Z][a-z]", same) else same
    wordings = []
    for pattern, forms in TURNS:
        found = re.fullmatch(pattern, bare, re.IGNORECASE)
        if found:
            wordings += [form.format(found.group(1)) for form in forms]
    wordings += [opening.format(same=same, lower=lower, bare=bare) for opening in OPENINGS]
    return [wording[:1].upper() + wording[1:] for wording in wordings if wording != same]


def connect(endpoint: str, model: str, preferred: Sequence[str]) -> "tuple[openai.OpenAI, str] | None":
    """Return a client and the model to ask, or None where nothing answers at the endpoint.

    Raises:
        DataError: Something answers, but refuses us or has no such model.
    """
    import openai

    client = openai.OpenAI(base_url=endpoint, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=REQUEST_TIMEOUT_S, max_retries=1)
    try:
        served = [entry.id for entry in client.models.list()]
    except openai.APIConnectionError:
        return None
    except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:  # also a web page, which the client takes for a list
        raise _refused(endpoint, error) from None
    wanted = [model] if model else preferred
    chosen = next((name for name in wanted if name in served), None)
    if chosen is None:
        why = f"wanted: {', '.join(wanted)}\nserved: {', '.join(served) or 'none'}"
        raise DataError(f"{endpoint} does not serve the model", why, f"--model {served[0]}" if served else "--templates")
    return client, chosen


def reword_by_model(client: "openai.OpenAI", model: str, question: str, count: int, seed: int) -> list[str] | None:
    """Ask for wordings, more than once if the first answer is short; None where the endpoint does not answer any more.

    Raises:
        DataError: The endpoint refuses the request.
    """
    import openai

    prompt = PROMPT.format(count=count, question=question)
    wordings: list[str] = []
    for attempt in range(NUM_TRIES):
        try:
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], temperature=1.0, max_tokens=64 * count, seed=seed + attempt
            )
            text = (reply.choices[0].message.content if reply.choices else "") or ""
        except openai.APIConnectionError:
            return None
        except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:
            raise _refused(str(client.base_url), error) from None
        wordings += [line for line in _lines(text) if _is_usable(line, question) and line not in wordings]
        if len(wordings) >= count:
            break
    return wordings


def _refused(endpoint: str, error: Exception) -> DataError:
    is_locked = getattr(error, "status_code", None) in (401, 403)
    remedy = "set OPENAI_API_KEY" if is_locked else "check --endpoint and --model, or use --templates"
    return DataError(f"{endpoint} did not answer as an OpenAI-compatible endpoint", f"{type(error).__name__}: {error}", remedy)


def _lines(text: str) -> list[str]:
    """Strip bullets, numbers and quotes, which small models add whatever one says."""
    lines = (re.sub(r"^\s*(?:[-*•]|\(?\d{1,2}[.):])\s*", "", line).strip().strip("\"'“”").strip() for line in text.splitlines())
    return [line for line in lines if line]


def _is_usable(wording: str, question: str) -> bool:
    """Refuse answers, chatter and questions about something else: numbers must stay, and some longer word too."""
    if not 3 <= len(wording) <= 3 * len(question) + 60:
        return False
    if set(re.findall(r"\d+", question)) - set(re.findall(r"\d+", wording)):
        return False
    words = set(re.findall(r"[^\W\d_]{4,}", normalise(question)))
    return not words or any(word in normalise(wording) for word in words)
