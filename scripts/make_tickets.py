"""Writes the quickstart's data: support tickets and the JSON object that files them.

    python scripts/make_tickets.py

Training and held-out tickets share neither a sentence about the matter nor one about its urgency. The study of methods
takes more held-out tickets: twenty say nothing about differences of a percent.
"""

import json
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER, STUDIES = ROOT / "recipes" / "data", ROOT / "studies" / "data"
INSTRUCTION = "File this support ticket. Answer with a JSON object that has the keys category and priority."

TRAIN = {
    "billing": [
        "I was charged twice for my subscription this month.",
        "The invoice shows a different amount than the one on my card.",
        "Please refund the payment I made by mistake.",
        "My credit card was declined although it is valid.",
        "I need an invoice with our company's tax number on it.",
        "The discount code was not applied to my bill.",
        "You still take money for a plan that I cancelled.",
        "How do I change the card that pays for the plan?",
        "The price on my receipt is in the wrong currency.",
        "I have not received the refund that you promised.",
    ],
    "account": [
        "I forgot my password and the reset email never comes.",
        "My account is locked after three login attempts.",
        "I want to change the email address that I sign in with.",
        "The two-factor code is never accepted.",
        "Please delete my account and all my data.",
        "Someone else signed in to my profile.",
        "I cannot log in since I got a new phone.",
        "How do I add a second user to our team account?",
        "My user name is spelled wrong on my profile.",
        "The sign-in page says that my account does not exist.",
    ],
    "delivery": [
        "My parcel has not arrived yet.",
        "The tracking number does not work.",
        "The box was damaged when the courier brought it.",
        "You sent the package to my old address.",
        "One item is missing from my order.",
        "The courier left the parcel with a neighbour I do not know.",
        "I received the wrong size of shoes.",
        "Can you ship my order to another country?",
        "The delivery date keeps moving.",
        "I would like to pick up my package myself.",
    ],
    "bug": [
        "The app crashes when I open the settings.",
        "The export button does nothing.",
        "The page stays blank after the last update.",
        "Search results are shown in the wrong order.",
        "Uploading a photo ends with error 500.",
        "The chart draws negative numbers upside down.",
        "Dark mode makes the text unreadable.",
        "The program freezes when I print.",
        "Notifications arrive twice on my tablet.",
        "The calendar shows the wrong day of the week.",
    ],
}
TRAIN_URGENCY = {
    "high": [
        "This is urgent, please help immediately!",
        "We are losing customers every hour, act now.",
        "I need this solved right away.",
        "Emergency: our whole team is blocked!",
        "It must work again today.",
        "Help as fast as you can, this can't wait.",
        "Please hurry, every minute counts!",
        "I can't do any work until this is solved.",
        "We need an answer at once.",
        "Highest priority, please!",
    ],
    "medium": [
        "Please look into it this week.",
        "I would like an answer in a few days.",
        "Could you check it by Friday?",
        "A reply in the coming days would be nice.",
        "Please take care of it soon.",
        "I hope to hear from you within the week.",
        "Please answer before the weekend.",
        "I expect a reply in two or three days.",
        "It should be done by the end of the week.",
        "Early next week is soon enough.",
    ],
    "low": [
        "There is no hurry.",
        "Whenever you have time.",
        "It can wait until next month.",
        "Not important, I just wanted to tell you.",
        "No rush with this one.",
        "Take as long as you need.",
        "Please do not hurry because of me.",
        "It is fine if this takes a while.",
        "Nothing urgent, some day will do.",
        "I have all the time in the world.",
    ],
}
HELD_OUT = {
    "billing": [
        "My bank statement lists your monthly fee two times.",
        "I paid too much and want my money back.",
        "Your invoice has the wrong company name on it.",
        "Why did the cost of my plan go up on the last bill?",
        "The voucher did not reduce the total that I had to pay.",
    ],
    "account": [
        "The link for a new password never reaches my inbox.",
        "I am locked out and can't sign in any more.",
        "A stranger seems to use my login.",
        "I need to replace the phone number on my profile.",
        "Please close my account for good.",
    ],
    "delivery": [
        "The courier says the package was handed over, but I have nothing.",
        "My order came in a torn box.",
        "Two of the books I ordered were not in the parcel.",
        "Please send the shipment to my office instead.",
        "The tracking page has not changed for days.",
    ],
    "bug": [
        "Saving a file makes the program close by itself.",
        "The menu covers half of the screen since the new version.",
        "Clicking on download shows an error message.",
        "The app freezes on the start screen.",
        "Numbers in the table are sorted wrongly.",
    ],
}
HELD_OUT_URGENCY = {
    "high": ["It is urgent, we need help right now!", "Please act immediately, we lose money every hour."],
    "medium": ["An answer this week would be good.", "Please look at it in the next days."],
    "low": ["I am not in a hurry at all.", "Take your time."],
}
# Of the study: every sentence with every wording. None of them is in the other two.
STUDY = {
    "billing": [
        "My invoice for March is missing from the list.",
        "The yearly plan was billed although I chose the monthly one.",
        "Can I pay by bank transfer instead of by card?",
        "You owe me a credit for the days without service.",
        "The tax on my bill is calculated with the wrong rate.",
    ],
    "account": [
        "My profile picture and name belong to somebody else now.",
        "The security question does not take my answer.",
        "How can I merge my two logins into one?",
        "I was signed out everywhere and my password is refused.",
        "A former colleague still has access to our workspace.",
    ],
    "delivery": [
        "The driver left without ringing the bell.",
        "Half of the shipment is still in the warehouse.",
        "My package went back to the sender.",
        "The glasses arrived broken in pieces.",
        "Which day will the truck come with the furniture?",
    ],
    "bug": [
        "The map shows only a grey square.",
        "After the restart all my settings are gone.",
        "The sound cuts out as soon as I open a second window.",
        "Dates are printed with the month and the day exchanged.",
        "The login button can't be seen on small screens, it lies under the picture.",
    ],
}
STUDY_URGENCY = {
    "high": [
        "This can't wait another hour!",
        "Drop everything else, please, it is critical.",
        "I have to have a solution within minutes.",
        "All our work has stopped because of it.",
        "Answer me now, the damage grows while I write.",
    ],
    "medium": [
        "I count on an answer before Monday.",
        "A solution by Thursday is what I need.",
        "Try to get back to me in two days or so.",
        "It would help to have this settled within the week.",
        "Let me know the day after tomorrow at the latest.",
    ],
    "low": [
        "Any time that suits you is good.",
        "It is only a small thing that can rest for a while.",
        "Look at it when nothing else is waiting.",
        "I can live with it for months.",
        "This has the lowest priority of all.",
    ],
}


def tickets(matters: dict[str, list[str]], urgency: dict[str, list[str]], per_sentence: int) -> list[dict[str, str]]:
    """Joins each sentence to `per_sentence` sentences of urgency; priorities and wordings take turns."""
    rows, number = [], 0
    for category, sentences in matters.items():
        for sentence in sentences:
            for _ in range(per_sentence):
                priority = list(urgency)[number % len(urgency)]
                wordings = urgency[priority]
                text = f"{sentence} {wordings[number // len(urgency) % len(wordings)]}"
                answer = json.dumps({"category": category, "priority": priority})
                rows.append({"instruction": INSTRUCTION, "input": text, "output": answer})
                number += 1
    return rows


def write_rows(name: str, rows: list[dict[str, str]], folder: Path = FOLDER) -> None:
    """Shuffles rows, always in the same way, and writes them."""
    random.Random(0).shuffle(rows)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{file}: {len(rows)} rows")


def main() -> None:
    write_rows("tickets_train", tickets(TRAIN, TRAIN_URGENCY, per_sentence=6))
    write_rows("tickets_heldout", tickets(HELD_OUT, HELD_OUT_URGENCY, per_sentence=1))
    write_rows("tickets_heldout", tickets(STUDY, STUDY_URGENCY, per_sentence=15), STUDIES)


if __name__ == "__main__":
    main()
