"""The whole circle with the real small model: asked, disliked with a better answer, reviewed, trained, weighed, live, and better."""

from pathlib import Path

import openai
import pytest

from tests.helpers.data import chat, write_rows
from tests.ray.stack import Stack

FACTS = {
    "open": (("When do you open?", "What are your opening hours?", "From when can I come?"), "We open at seven.", "seven"),
    "rye": (("What is in the rye bread?", "What do you bake rye bread from?", "Tell me about the rye."), "Rye, water and salt.", "salt"),
    "order": (("How do I order a cake?", "Can I order cakes?", "I want a cake made."), "Call us two days before.", "two days"),
    "owner": (("Who owns the bakery?", "Whose bakery is this?", "Who is the boss?"), "Ines owns it.", "Ines"),
    "closed": (("When are you closed?", "Which day is your day off?", "Do you rest on some day?"), "We rest on Mondays.", "Monday"),
    "pay": (("How can I pay?", "What payment do you take?", "Do you take cards?"), "Cash or card, as you like.", "card"),
}
QUESTION = "Where can I leave my bicycle?"
BETTER = "Behind the mill."


@pytest.fixture(scope="module")
def bakery(stack: Stack) -> Path:
    """A chatbot of six facts; of each the last wording is held out."""
    rows = [
        chat(question, answer, split="heldout" if question == questions[-1] else "train", keys=[key], group=fact)
        for fact, (questions, answer, key) in FACTS.items()
        for question in questions
    ]
    file = stack.folder / "bakery.yaml"
    file.write_text(
        f"name: bakery\ndata: {{source: {write_rows(stack.folder / 'bakery.jsonl', rows)}, split: marked, max_length_tokens: 64,\n"
        "       system_prompt: Bakery}\n"
        "train: {lora: {rank: 16, target_modules: [gate_proj, up_proj, down_proj]}, learning_rate: 4.0e-3, batch_size: 4,\n"
        "        num_epochs: 8, checkpoint_every_steps: 100}\n"
        f"serve: {{port: {stack.ports['chat']}, max_model_len_tokens: 256, max_lora_rank: 16, feedback: {{keep_conversations: true}}}}\n"
        "evaluation: {general: null, max_answer_tokens: 24}\n"
        "gate: {metrics: {accuracy: {minimum: 0.5, may_lose_at_most: 0.2}}}\n"
    )
    return file


def test_what_people_said_makes_the_next_version_answer_better(stack: Stack, bakery: Path):
    stack.serve(bakery)

    def run(*words: str) -> str:
        done = stack.run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("train", str(bakery), "--promote")
    client = openai.OpenAI(base_url=stack.endpoint, api_key=stack.make_key("guest"), max_retries=0, timeout=120)

    def ask(question: str) -> openai.types.chat.ChatCompletion:
        asked = [{"role": "user", "content": question}]
        return client.chat.completions.create(model="bakery", messages=asked, max_tokens=24, temperature=0)

    first = ask(QUESTION)
    assert "mill" not in first.choices[0].message.content
    said = {"completion_id": first.id, "rating": "down", "better_answer": BETTER}
    client.post("/feedback", body=said, cast_to=dict[str, str])
    run("data", "feedback", str(bakery), "--since", "1h")
    run("data", "accept", str(bakery), "--all")
    assert "gate holds: accuracy" in run("train", str(bakery), "--promote")
    second = ask(QUESTION)
    assert (first.model, second.model) == ("bakery:1", "bakery:2")
    assert "mill" in second.choices[0].message.content
    assert "seven" in ask(FACTS["open"][0][0]).choices[0].message.content
    traced = run("data", "trace", "bakery:2")
    assert "guest" in traced, "whose feedback it learned from"
