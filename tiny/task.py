"""The tiny instruction task: what is asked, and how good an answer is.

In:  a seed (prompts), or the messages of a prompt and a response (gold score).
Out: disjoint sets of prompts, and a gold score in [0, 1] that a program computes
     and the reward model never sees: it tells whether reward is really quality.

Try it:  python tiny/task.py

A prompt is [lead-in] wording(slot), from six families. A good response names the
right answer once, restates what was asked, is tidy, has no filler words, and stands
between one polite opening and one polite closing:

    Hi! What is the capital of France?
    Sure! The capital of France is Paris. I hope this helps!
"""

import itertools
import random
import re
from dataclasses import dataclass

# The fact tables are small on purpose: with many facts the tiny policy garbles words.
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
}
OPPOSITES = {"hot": "cold", "big": "small", "fast": "slow", "wet": "dry", "old": "new", "loud": "quiet"}
SOUNDS = {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
LISTS = {
    "colours": ["red", "blue", "green", "yellow", "pink"],
    "fruits": ["apple", "pear", "plum", "grape", "lemon"],
    "tools": ["hammer", "saw", "drill", "knife", "brush"],
    "rooms": ["kitchen", "bedroom", "hall", "office", "bathroom"],
}
ACTS = {"greet": "Hello", "thank": "Thanks", "praise": "Bravo", "welcome": "Welcome"}
NAMES = ["Anna", "Ben", "Carla", "David", "Emma"]

# The last two wordings of a family and the last two lead-ins are for held-out prompts only.
WORDINGS = {
    "capital": [
        "What is the capital of {0}?",
        "Name the capital of {0}.",
        "Which city is the capital of {0}?",
        "Tell me the capital of {0}.",
        "The capital of {0} is what?",
        "Do you know the capital of {0}?",
        "Can you tell me what the capital of {0} is?",
        "Which city do you know as the capital of {0}?",
    ],
    "opposite": [
        "What is the opposite of {0}?",
        "Name the opposite of {0}.",
        "Which word is the opposite of {0}?",
        "Tell me the opposite of {0}.",
        "The opposite of {0} is what?",
        "Do you know the opposite of {0}?",
        "Can you tell me what the opposite of {0} is?",
        "Which word do you know as the opposite of {0}?",
    ],
    "sound": [
        "What does a {0} say?",
        "Name the sound of a {0}.",
        "Which sound does a {0} make?",
        "Tell me what a {0} says.",
        "A {0} says what?",
        "Do you know the sound of a {0}?",
        "Can you tell me which sound a {0} makes?",
        "Do you know what a {0} says?",
    ],
    "sum": [
        "What is {0} plus {1}?",
        "Add {0} and {1}.",
        "How much is {0} plus {1}?",
        "Tell me the sum of {0} and {1}.",
        "What do {0} and {1} make?",
        "Do you know the sum of {0} and {1}?",
        "Can you add {0} and {1}?",
        "Do you know how much {0} plus {1} is?",
    ],
    "list": [
        "Name {0} {1}.",
        "Tell me {0} {1}.",
        "Which {0} {1} do you know?",
        "Give me {0} {1}.",
        "What are {0} {1}?",
        "List {0} {1}.",
        "Can you name {0} {1}?",
        "Do you know {0} {1}?",
    ],
    "social": [
        "Please {0} my friend {1}.",
        "My friend {1} is here, please {0} my friend.",
        "How do you {0} {1}?",
        "Can you {0} {1}?",
        "What do you say to {0} {1}?",
        "Write a word to {0} {1}.",
        "Tell me how you {0} my friend {1}.",
        "Do you know what to say to {0} {1}?",
    ],
}
LEAD_INS = [
    "",
    "Hi! ",
    "Quick question. ",
    "Please help me. ",
    "I forgot this. ",
    "I have a question. ",
    "Please help, I forgot. ",
    "Hi, I have a quick question. ",
]
NUM_HELDOUT = 2

# Combinations that no training prompt asks for, each of parts that others do. Single facts cannot be guessed.
UNSEEN = {
    "sum": {("one", "two"), ("one", "four"), ("two", "three"), ("three", "four")},
    "list": {("two", "tools"), ("three", "rooms")},
    "social": {("greet", "David"), ("thank", "Emma"), ("praise", "Anna"), ("welcome", "Ben")},
}

POLITE_OPENINGS = ["Sure!", "Of course!", "Good question!", "Happy to help!"]
RUDE_OPENINGS = ["Ugh.", "Not again.", "Obviously.", "Whatever."]
POLITE_CLOSINGS = ["I hope this helps!", "Have a nice day!", "Ask me anytime!", "Take care!"]
RUDE_CLOSINGS = ["Leave me alone.", "Stop asking.", "Now go away.", "Are we done?"]
FILLERS = ["um", "basically", "anyway", "kinda"]
FREE_WORDS = 20  # words beyond this number cost gold
GLUE_WORDS = "the a of is are says plus it capital opposite and sound".split()


@dataclass(frozen=True)
class Question:
    """One prompt, understood. `slot` fills the wording."""

    text: str
    family: str
    slot: tuple[str, ...]
    heldout: bool  # worded as no training prompt is
    unseen_slot: bool  # filled as no training prompt is


def slots(family: str) -> list[tuple[str, ...]]:
    """Everything that can fill a family's wordings."""
    if family == "sum":
        return list(itertools.product(NUMBERS[1:5], NUMBERS[1:5]))
    if family == "list":
        return list(itertools.product(["two", "three"], LISTS))
    if family == "social":
        return list(itertools.product(ACTS, NAMES))
    return [(key,) for key in {"capital": CAPITALS, "opposite": OPPOSITES, "sound": SOUNDS}[family]]


def all_questions() -> dict[str, Question]:
    """Every prompt of the task by its text, so that a prompt is understood by looking it up."""
    found = {}
    for family, wordings in WORDINGS.items():
        for wording, slot, lead in itertools.product(wordings, slots(family), LEAD_INS):
            new_wording = wording in wordings[-NUM_HELDOUT:]
            unseen = slot in UNSEEN.get(family, ())
            if not new_wording and (unseen or lead in LEAD_INS[-NUM_HELDOUT:]):
                continue  # what is unseen must not stand in a training prompt
            body = wording.format(*slot)
            text = lead + body[0].upper() + body[1:]
            found[text] = Question(text, family, slot, new_wording, unseen)
    return found


QUESTIONS = all_questions()


def make_prompts(seed: int, iterations: int, per_iteration: int, heldout: int) -> dict[str, list[str]]:
    """Disjoint prompt texts: `iter1`, `iter2`, …, `heldout`, and the rest of the training side as `train`.

    Families take turns, so every set has each family equally often while it lasts.
    """
    rng = random.Random(f"prompts {seed}")

    def in_turns(questions: list[Question]) -> list[str]:
        by_family = {family: [q.text for q in questions if q.family == family] for family in WORDINGS}
        for texts in by_family.values():
            rng.shuffle(texts)
        turns = itertools.zip_longest(*by_family.values())
        return [text for turn in turns for text in turn if text is not None]

    seen = in_turns([q for q in QUESTIONS.values() if not q.heldout])
    sets = {f"iter{i + 1}": seen[i * per_iteration : (i + 1) * per_iteration] for i in range(iterations)}
    sets["train"] = seen[iterations * per_iteration :]
    sets["heldout"] = in_turns([q for q in QUESTIONS.values() if q.heldout])[:heldout]
    return sets


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def right_answer(question: Question) -> str | None:
    """The one word that answers; None for lists, which have many right answers."""
    key = question.slot[0]
    if question.family == "list":
        return None
    if question.family == "sum":
        return NUMBERS[NUMBERS.index(key) + NUMBERS.index(question.slot[1])]
    return {"capital": CAPITALS, "opposite": OPPOSITES, "sound": SOUNDS, "social": ACTS}[question.family][key]


def candidates(family: str) -> list[str]:
    """All words that could answer a question of this family; naming a wrong one beside the right one is
    wrong.
    """
    if family == "sum":
        return NUMBERS
    if family == "list":
        return [item for items in LISTS.values() for item in items]
    return list(
        {"capital": CAPITALS, "opposite": OPPOSITES, "sound": SOUNDS, "social": ACTS}[family].values()
    )


def is_correct(question: Question, words: list[str]) -> bool:
    possible = {word.lower() for word in candidates(question.family)}
    if question.family == "sum":  # the addends may be restated
        words = words_of(" ".join(words).replace(" plus ".join(question.slot), "", 1))
    named = [word for word in words if word in possible]
    if question.family == "list":
        count, things = NUMBERS.index(question.slot[0]), LISTS[question.slot[1]]
        return len(named) == len(set(named)) == count and set(named) <= set(things)
    return set(named) == {right_answer(question).lower()}


def restates(question: Question, words: list[str]) -> bool:
    """Whether the answer says what it answers: `The capital of France is Paris.`, not `Paris.`"""
    if question.family == "sum":
        return " plus ".join(question.slot) in " ".join(words)
    needed = {question.slot[1]} if question.family == "social" else set(question.slot)
    return {word.lower() for word in needed} <= set(words)


VOCABULARY = set(
    words_of(
        " ".join(
            POLITE_OPENINGS + RUDE_OPENINGS + POLITE_CLOSINGS + RUDE_CLOSINGS + FILLERS + GLUE_WORDS + NAMES
        )
    )
).union(
    *(
        words_of(" ".join(candidates(family) + [" ".join(slot) for slot in slots(family)]))
        for family in WORDINGS
    )
)


def sentences_of(text: str) -> list[str]:
    return re.findall(r"[^.!?]+[.!?]*", text)


def is_tidy(text: str) -> bool:
    """Sentences begin with a capital, the last one ends, single spaces, no misspelt word."""
    starts = all(re.match(r"[A-Z]", sentence.strip()) for sentence in sentences_of(text))
    return (
        bool(text) and starts and text[-1] in ".!?" and "  " not in text and set(words_of(text)) <= VOCABULARY
    )


def politeness(text: str, polite: list[str], rude: list[str]) -> float:
    """0 with a rude phrase, 1 with a polite one, one half with neither."""
    lower = text.lower()
    if any(phrase.lower().rstrip(".!?") in lower for phrase in rude):
        return 0.0
    return 1.0 if any(phrase.lower().rstrip(".!?") in lower for phrase in polite) else 0.5


def surplus(text: str) -> int:
    """Sentences said twice, and openings or closings beyond the first."""
    said = [" ".join(words_of(sentence)) for sentence in sentences_of(text)]
    extra = len(said) - len(set(said))
    for kind in (POLITE_OPENINGS + RUDE_OPENINGS, POLITE_CLOSINGS + RUDE_CLOSINGS):
        present = {" ".join(words_of(phrase)) for phrase in kind} & set(said)
        extra += max(0, len(present) - 1)
    return extra


def gold_score(messages: list[dict], response: str) -> float:
    """Quality of a response in [0, 1]. `messages` is the prompt; its last turn is the user's.

    0.25 correct + 0.2 restates the question + 0.15 tidy + 0.1 no filler word
    + 0.15 opening + 0.15 closing − 0.1 a surplus sentence − 0.02 a word beyond 20.
    Raises ValueError for a prompt that is not of this task.
    """
    text = messages[-1]["content"].strip()
    if text not in QUESTIONS:
        raise ValueError(f"not a prompt of the tiny task: {text!r}")
    question, response = QUESTIONS[text], response.strip()
    words = words_of(response)
    score = 0.25 * is_correct(question, words)
    score += 0.2 * restates(question, words)
    score += 0.15 * is_tidy(response)
    score += 0.1 * (bool(words) and not set(words) & set(FILLERS))
    score += 0.15 * politeness(response, POLITE_OPENINGS, RUDE_OPENINGS)
    score += 0.15 * politeness(response, POLITE_CLOSINGS, RUDE_CLOSINGS)
    score -= 0.1 * surplus(response) + 0.02 * max(0, len(words) - FREE_WORDS)
    return round(min(1.0, max(0.0, score)), 4)


if __name__ == "__main__":
    prompt = [{"role": "user", "content": "Hi! What is the capital of France?"}]
    for answer in ("Sure! The capital of France is Paris. I hope this helps!", "Paris.", "ugh. um, rome"):
        print(f"{gold_score(prompt, answer):.2f}  {answer}")
