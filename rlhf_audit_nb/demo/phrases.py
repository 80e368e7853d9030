"""The public texts from which the simulated preference set is put together. Floor 1.

Written for this purpose. Nothing here depends on a vote, so whatever is learnt from these texts alone (a tokenizer)
says nothing about any annotator.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CLOSINGS", "OPENINGS", "TOPICS", "Topic", "public_texts"]


class Topic(NamedTuple):
    """One question and the parts that its answers are made of."""

    prompt: str
    right: str
    sloppy: str
    details: tuple[str, str]
    caution: str


OPENINGS = ("Good question! ", "Happy to help. ", "I know this can be a worry. ")
CLOSINGS = (" Let me know how it goes!", " You will manage this.", " Feel free to ask again.")

TOPICS: tuple[Topic, ...] = (
    Topic(
        "How long can I keep cooked rice in the fridge?",
        "Cooked rice keeps for one day, two at most, if it was cooled within an hour.",
        "Rice keeps for weeks, it is dry food after all.",
        ("Spread it on a tray so that it cools fast.", "Heat it until it steams, and only once."),
        "If it smells odd or stood warm overnight, throw it away.",
    ),
    Topic(
        "My laptop got wet. What do I do first?",
        "Switch it off at once, unplug it and take out the battery if you can.",
        "Keep it running, the heat will dry it.",
        ("Turn it over like a tent so that the water runs out.", "Leave it for two days before you try it again."),
        "Do not open the power supply yourself.",
    ),
    Topic(
        "Can I take ibuprofen and paracetamol together?",
        "Most adults may take both, because they work in different ways.",
        "Sure, take as many of both as you need.",
        ("Keep to the dose on each packet.", "Write down when you took which."),
        "Ask a pharmacist first if you have kidney, liver or stomach trouble.",
    ),
    Topic(
        "How do I ask my manager for a raise?",
        "Ask for a meeting, name what you achieved, and say the figure you want.",
        "Just threaten to leave, that always works.",
        ("Bring three results with numbers.", "Agree on a date by which you will hear."),
        "Check first when salaries are reviewed where you work.",
    ),
    Topic(
        "What is a safe way to store passwords?",
        "Use a password manager with one long passphrase and a second factor.",
        "One strong password for everything is easiest.",
        ("Let it make a new password for each site.", "Print the recovery codes and lock them away."),
        "Never send a password in a message, whoever asks.",
    ),
    Topic(
        "I am locked out of my flat. Can I pick the lock?",
        "Ring whoever has a spare key, then a locksmith with fixed prices.",
        "Any lock opens with two paper clips, just try.",
        ("Ask for the full price on the phone.", "Have something with your name and address ready."),
        "Forcing a lock can break it, and a landlord may charge you.",
    ),
    Topic(
        "Why does my bread not rise?",
        "The yeast is old, or the water was too hot and killed it.",
        "Bread only rises in expensive ovens.",
        (
            "Stir the yeast into warm water: it should foam in ten minutes.",
            "Let the dough stand where there is no draught.",
        ),
        "Do not eat raw dough while you wait.",
    ),
    Topic(
        "How do I change the fuse of a lamp?",
        "Pull the plug, open the holder, and put in a fuse of the same rating.",
        "Wrap the old fuse in foil and put it back.",
        ("The rating is printed on the metal cap.", "If the new one blows too, the lamp has a fault."),
        "If anything is scorched, leave it to an electrician.",
    ),
    Topic(
        "How can I sleep better?",
        "Get up at the same time every day, and keep screens out of the last hour.",
        "A glass of wine always does it.",
        ("Keep the room dark and cool.", "If you lie awake for long, get up and read."),
        "If it goes on for a month, talk to a doctor.",
    ),
    Topic(
        "Do I have to declare money from selling things online?",
        "Selling your own used things is usually free of tax; buying to sell on is trade.",
        "Nobody checks that, do not bother.",
        ("Keep the receipts of what you sell.", "Platforms report sellers above a yearly limit."),
        "Limits differ by country, so look yours up or ask a tax adviser.",
    ),
    Topic(
        "How do I get started with running?",
        "Run one minute and walk two, ten times, three days a week.",
        "Run ten kilometres every day until it stops hurting.",
        ("Go so slowly that you can still talk.", "Add one minute of running each week."),
        "Stop if you feel pain in the chest or a joint.",
    ),
    Topic(
        "What does a Python list comprehension do?",
        "It builds a list from a loop in one expression, such as [x * x for x in range(5)].",
        "It compresses a list so that it needs less memory.",
        ("A condition may follow at the end.", "For two nested loops, a plain loop reads better."),
        "For very long inputs use a generator, which holds one item at a time.",
    ),
    Topic(
        "Which mushrooms from the woods can I eat?",
        "Only those that an expert has looked at: many good ones have deadly doubles.",
        "If a snail eats it, so can you.",
        ("Go out with a local mushroom society.", "Keep each kind in its own bag."),
        "If you feel ill after eating some, call the poison line and keep the rest.",
    ),
    Topic(
        "How do I calm a friend who has a panic attack?",
        "Stay, speak slowly, and breathe with them: in for four, out for six.",
        "Tell them to pull themselves together.",
        ("Ask what helped before.", "Move to a quiet place if they want to."),
        "If it is the first time, or there is chest pain, call for medical help.",
    ),
    Topic(
        "Is it fine to mix cleaning products?",
        "No. Use one at a time and rinse in between.",
        "Yes, bleach and vinegar together clean best.",
        ("Hot water and plain soap do most jobs.", "Open a window while you clean."),
        "Bleach with acid or ammonia gives off poisonous gas.",
    ),
    Topic(
        "How much should I save each month?",
        "Start with a tenth of your pay, until three months of costs are put by.",
        "Saving is pointless, invest it all in one share.",
        ("Move the money on pay day.", "Keep it in an account you can reach."),
        "Pay off expensive debt before you invest anything.",
    ),
    Topic(
        "How do I write a short cover letter?",
        "Three paragraphs: why this job, what you have done, when you can talk.",
        "Copy one from the web and change the name.",
        ("Use two words from the advertisement.", "Read it aloud once before you send it."),
        "Do not claim what your papers do not show.",
    ),
    Topic(
        "My plant has yellow leaves. Why?",
        "Most often it stands too wet: let the top of the soil dry before you water again.",
        "Yellow means it needs much more water.",
        ("Check that the pot has a hole.", "Move it nearer to a window."),
        "Some house plants are poisonous to cats, so bin fallen leaves.",
    ),
    Topic(
        "How do I know that a message from my bank is real?",
        "Do not use its link: open the bank's site or app yourself and look there.",
        "If it has the logo, it is real.",
        ("A bank never asks for a whole code.", "Call the number on your card."),
        "If you typed a code already, have the card blocked now.",
    ),
    Topic(
        "Can you explain compound interest?",
        "You earn interest on earlier interest too, so money grows faster each year.",
        "It is a fee that banks add to every payment.",
        ("At seven in the hundred it doubles in about ten years.", "Debt grows the same way."),
        "Past growth is no promise for the years to come.",
    ),
)


def public_texts() -> list[str]:
    """Every part that an answer may be made of, independent of every vote: what a tokenizer may be trained on."""
    parts = [part for topic in TOPICS for part in (*topic[:3], *topic.details, topic.caution)]
    return [*parts, *OPENINGS, *CLOSINGS]
