"""Writes the data of the help desk pipeline: a handbook (raw text) and replies to customers (preference pairs).

    python scripts/make_desk.py

The tickets in both are those of `make_tickets.py`. Training and held-out rows share neither tickets nor replies.
"""

from make_tickets import HELD_OUT, HELD_OUT_URGENCY, TRAIN, TRAIN_URGENCY, write_rows

ABOUT = {
    "billing": "it is about money: payments, invoices, prices, refunds and plans",
    "account": "it is about a person's access: signing in, passwords, profiles and their data",
    "delivery": "it is about goods on their way: parcels, couriers, addresses and missing items",
    "bug": "it is about a program that does not do what it should: crashes, errors and wrong results",
}
SENT_TO = {
    "billing": "The finance desk answers, and looks at the last three invoices first.",
    "account": "The identity desk answers, and never asks for a password.",
    "delivery": "The shipping desk answers, and asks the courier before it asks the customer.",
    "bug": "The engineering desk answers, and tries to see the fault for itself.",
}
PRIORITIES = {
    "high": "someone can't go on without an answer, so it is read within the hour",
    "medium": "an answer is wanted within days, so it is read on the same day",
    "low": "nobody waits for an answer, so it is read when the others are done",
}
ASK = "Answer this customer in one or two sentences."
LOOK = {
    "billing": "we are looking at your invoices now",
    "account": "we are checking your sign-in now",
    "delivery": "we are asking the courier now",
    "bug": "we are trying to see the fault ourselves now",
}
GOOD = [
    "Thank you for telling us. I am sorry for the trouble; {look}, and you will hear from us {when}.",
    "I am sorry about this. To help you, {look}. We will write again {when}.",
    "Thanks for your message, and sorry for the inconvenience: {look}. Expect our answer {when}.",
]
BAD = [
    "That can't be. You must have done something wrong, please read the manual first.",
    "We promise that everything is solved already and you get all your money back today!",
    "This is not my job. Write to somebody else.",
    "As I said many times to many people, such things happen, and nobody can do anything about it.",
    "Your message was received. Your message will be processed. Do not reply to this message.",
    "Guaranteed: it will never happen again, we have never made a mistake before.",
]
HELD_OUT_GOOD = ["We are sorry that this happened, and thank you for writing: {look}. Our reply follows {when}."]
HELD_OUT_BAD = [
    "Nobody else has this problem, so look for the cause on your side.",
    "It is certain that this works perfectly now, trust us and stop writing.",
    "Other people have to wait as well, we do not care about yours.",
]
WHEN = {"high": "within the hour", "medium": "today", "low": "in the coming days"}

Sentences = dict[str, list[str]]


def handbook(matters: Sentences, urgency: Sentences) -> list[dict[str, str]]:
    """A page for each sentence that a customer may write."""
    pages = [
        f'Help desk handbook, category {category}. A customer writes: "{sentence}" '
        f"We file this under {category}, because {ABOUT[category]}. {SENT_TO[category]}"
        for category, sentences in matters.items()
        for sentence in sentences
    ]
    pages += [
        f'Help desk handbook, priority {priority}. A customer writes: "{sentence}" The priority is {priority}, because '
        f"{PRIORITIES[priority]}."
        for priority, sentences in urgency.items()
        for sentence in sentences
    ]
    return [{"text": page} for page in pages]


def replies(matters: Sentences, urgency: Sentences, good: list[str], bad: list[str], each: int) -> list[dict[str, str]]:
    """Pairs of a reply that helps and one that does not, `each` for every sentence; wordings take turns."""
    rows: list[dict[str, str]] = []
    for category, sentences in matters.items():
        for sentence in sentences:
            for _ in range(each):
                number = len(rows)
                priority = list(urgency)[number % len(urgency)]
                wordings = urgency[priority]
                ticket = f"{sentence} {wordings[number // len(urgency) % len(wordings)]}"
                reply = good[number // len(urgency) % len(good)].format(look=LOOK[category], when=WHEN[priority])
                rows.append({"prompt": f"{ASK}\n\n{ticket}", "chosen": reply, "rejected": bad[number % len(bad)]})
    return rows


def main() -> None:
    write_rows("handbook_train", handbook(TRAIN, TRAIN_URGENCY))
    write_rows("handbook_heldout", handbook(HELD_OUT, HELD_OUT_URGENCY))
    write_rows("replies_train", replies(TRAIN, TRAIN_URGENCY, GOOD, BAD, each=2))
    write_rows("replies_heldout", replies(HELD_OUT, HELD_OUT_URGENCY, HELD_OUT_GOOD, HELD_OUT_BAD, each=1))


if __name__ == "__main__":
    main()
