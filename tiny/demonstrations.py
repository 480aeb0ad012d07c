"""Written answers to the tiny task: what the policy first imitates, and what the reward model compares.

In:  a question of tiny/task.py, a random generator, and how good the answer should be.
Out: an answer as text. Its score is never decided here, always by `task.gold_score`.

Try it:  python tiny/demonstrations.py
"""

import random

import task


def pick_answer(rng: random.Random, question: task.Question, correct: bool) -> str:
    """The words that answer: the right ones, or a slip of the kind a small model makes."""
    if question.family == "list":
        return pick_list(rng, question, correct)
    right = task.right_answer(question)
    if correct:
        return right
    return rng.choice([word for word in task.candidates(question.family) if word != right])


def pick_list(rng: random.Random, question: task.Question, correct: bool) -> str:
    count, things = task.NUMBERS.index(question.slot[0]), task.LISTS[question.slot[1]]
    items = rng.sample(things, count)
    if not correct:
        slip = rng.choice(["one more", "one less", "intruder", "twice"])
        if slip == "one more":
            items = rng.sample(things, count + 1)
        elif slip == "one less":
            items = items[1:]
        elif slip == "twice":
            items[-1] = items[0]
        else:
            others = [item for item in task.candidates("list") if item not in things]
            items[rng.randrange(count)] = rng.choice(others)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def core_sentence(question: task.Question, answer: str, restate: bool, filler: str | None) -> str:
    """The middle of the answer, without its final mark."""
    said = f"{filler}, {answer}" if filler else answer
    if not restate:
        return said
    slot = question.slot
    return {
        "capital": f"The capital of {slot[0]} is {said}",
        "opposite": f"The opposite of {slot[0]} is {said}",
        "sound": f"A {slot[0]} says {said}",
        "sum": f"{slot[0]} plus {slot[-1]} is {said}",
        "list": f"{slot[0]} {slot[-1]} are {said}",
        "social": f"{said}, {slot[-1]}",
    }[question.family]


def write_answer(rng: random.Random, question: task.Question, good: float, correct: float) -> str:
    """An answer that is right with probability `correct`, and good in each matter of style with `good`.

    Style is drawn before the answer: two generators of one seed, one with `correct` 1 and one
    with 0, give two answers that differ in correctness only.
    """
    filler = None if rng.random() < max(good, 0.6) else rng.choice(task.FILLERS)
    restate, tidy = rng.random() < good, rng.random() < good
    slip = rng.randrange(3)
    opening, closing = (
        rng.choices([rng.choice(polite), rng.choice(rude), ""], [good, 0.4 * (1 - good), 0.6 * (1 - good)])[0]
        for polite, rude in (
            (task.POLITE_OPENINGS, task.RUDE_OPENINGS),
            (task.POLITE_CLOSINGS, task.RUDE_CLOSINGS),
        )
    )
    core = core_sentence(question, pick_answer(rng, question, rng.random() < correct), restate, filler)
    text = " ".join(part for part in (opening, core[0].upper() + core[1:] + ".", closing) if part)
    return text if tidy else [text.lower(), text.rstrip(".!?"), text.lower().rstrip(".!?")][slip]


def spoil(rng: random.Random, answer: str) -> str:
    """Turn an answer into what a policy drifts to when it chases reward: repeated, gushing or cut off."""
    kind = rng.choice(["repeat", "gush", "cut", "cut", "hedge"])
    sentences = [sentence.strip() for sentence in task.sentences_of(answer)]
    words = answer.split()
    if kind == "repeat":
        at = rng.randrange(len(sentences))
        return " ".join(sentences[: at + 1] + sentences[at:] * rng.choice([1, 1, 2]))
    if kind == "gush":
        phrases = rng.sample(rng.choice([task.POLITE_OPENINGS, task.POLITE_CLOSINGS]), rng.choice([1, 2, 3]))
        return " ".join(phrases + sentences if phrases[0] in task.POLITE_OPENINGS else sentences + phrases)
    if kind == "cut":
        return " ".join(words[: rng.randrange(1, max(2, len(words)))])
    at = rng.randrange(len(words))
    return " ".join(words[: at + 1] + words[max(0, at - rng.choice([0, 1, 2, 3])) :])


if __name__ == "__main__":
    generator = random.Random(0)
    for asked in generator.sample(sorted(task.QUESTIONS), 8):
        for goodness in (0.4, 0.9):
            written = write_answer(generator, task.QUESTIONS[asked], goodness, goodness)
            score = task.gold_score([{"role": "user", "content": asked}], written)
            print(f"{asked}\n  {score:.2f}  {written}\n        {spoil(generator, written)}")
