"""Writes seed prompts for distillation, one per line: many kinds of requests about many subjects.

Usage: python scripts/seed_prompts.py COUNT > prompts.txt
"""

from __future__ import annotations

import random
import re
import sys

REQUESTS = """\
Write a short story about {}.
Write a poem about {}.
Write a blog post about {}.
Write a product description for {}.
Write an email to a colleague about {}.
Write a news report about {}.
Write a dialogue between two friends about {}.
Write a diary entry of someone who has just discovered {}.
Write the opening paragraph of a novel in which {} matters.
Write a polite letter that complains about {}.
Write a review of a book on {}.
Write a haiku about {}, then explain it.
Write an advertisement for {} in at most fifty words.
Describe {} with all five senses.
Invent a legend that explains {}.
Imagine you are an expert on {}. What would you tell a beginner?
Pretend to be a travel guide and tell me about {}.
You are a teacher. Explain {} to a child of ten years.
You are a {} from the year 1850. Tell me how you see {}.
Act as a {} and give me your honest opinion of {}.
Act as a critic and review {}.
Play a {} who is asked about {} by a stranger. Stay in character.
I am a {}. How does {} concern me?
What are the advantages and disadvantages of {}?
Compare {} with {}.
Which is better, {} or {}? Give reasons.
Why do people care about {}?
What would happen if there were no more {}?
Is it true that {} can be dangerous? Explain your reasoning.
If every {} likes {}, and Tom does not, can Tom be a {}? Think step by step.
{name} came home before {name2}, and {name2} before {name3}. Who was last?
{name} has {n} {thing}s and gives {m} to {name2}. How many are left?
If a {thing} costs {m} dollars and I buy {n}, how much do I pay? Show each step.
A shop sells {n} {thing}s a day for {m} dollars each. What does it earn in a week?
What is {n} times {m}? And what is {n} divided by {m}?
Solve for x: {m}x + {n} = {o}.
A rectangle is {n} cm long and {m} cm wide. Find its area and perimeter.
{name} walks {n} kilometres in {m} hours. How fast is that?
What is {m} percent of {o}?
A class of {o} students studies {}. A third of them leave. How many are left?
The average of three numbers is {n}. Two of them are {m} and {o}. What is the third?
Make up a word problem about {} and solve it.
Write a Python function that {task}.
Write a Python function that {task}. Add a docstring and two tests.
Write a JavaScript function that {task}.
Write a C++ program that {task}.
Write a Java method that {task}.
How would I {task2} in Python?
What is wrong with a loop that never ends, and how do I find it when I {task2}?
Write a Python class that models a {thing}.
Write an SQL query that finds the ten most expensive rows of a table of {thing}s.
Explain how you would write a program that deals with {}.
Write HTML for a page about {}.
Write a regular expression that matches {pattern}, and explain each part.
List the key facts about {} as bullet points.
Summarize what is known about {} in three sentences.
Give the names, places and dates that matter for {} as a table.
Make a JSON object that describes a {thing}.
Extract the people and places from this text: {name} left {place} in 19{nn} to study {} in {place2} with {name2}.
Give name, city and age as JSON: {name}, who is {nn}, lives in {place}.
Summarize in one sentence: {name} and {name2} met in {place} to talk about {}, but they could not agree and went home.
What is this text about, and is its tone positive? "{name} bought a {thing} in {place} and is delighted."
Classify these as good or bad news and say why: there is more {} than ever.
Sort these by size and explain: a {thing}, {place}, a {thing2}.
Which of these words does not belong: {thing}, {thing2}, {place}?
What questions should I ask to learn about {}?
Explain the science behind {}.
How does {} work?
What is the difference between {} and {}?
How is {} measured, and in what units?
What are the main parts of {}, and what does each of them do?
Describe the history of {}.
What did philosophers say about {}?
How has {} changed society?
Discuss the role of {} in literature and art.
What are the ethical questions about {}?
Who were the most important people in the history of {}?
What caused the rise of {}?
What is {place} known for?
How do people in {place} and in {place2} think about {}?
Give me ten tips about {}.
Give me three ideas for a birthday present for a {} who likes {}.
Make a plan for a week to learn about {}.
Plan a day in {place} for someone who likes {}.
How do I get started with {}?
What are common mistakes with {}, and how can I avoid them?
Write a speech about {}.
Write a song about {}.
Give me a recipe with {food} and {food2}.
What can I cook with {food}?
Rewrite this in a more formal tone: we really need to talk about {}.
Make this shorter: in my opinion, and I have thought about it for long, {} is something that all should know.
Correct the grammar: she have told me everything of {} yesterday.
Translate to Spanish: I would like to know more about {}.
Translate to French: {name} lives in {place} and has a {thing}.
Write five trivia questions with answers about {}.
What is {}?
Tell me about {}.
Tell me something surprising about {}.
Can you help me understand {}?
I am worried about {}. What should I do?
My {thing} is broken. What can I try?
Hi! I am {name}, and I have to give a talk about {} tomorrow. Can you help?
hello, can you tell me about {}
Finish this sentence and go on for a paragraph: When it comes to {},
""".splitlines()

SUBJECTS = """\
volcanoes, black holes, photosynthesis, vaccines, the immune system, electric cars, solar panels, wind power, the Roman
Empire, the French Revolution, the Silk Road, the Renaissance, the moon landing, ancient Egypt, jazz, chess, gardening,
home cooking, bread baking, coffee, tea, chocolate, cheese, beekeeping, whales, penguins, owls, dogs, cats, horses,
dinosaurs, coral reefs, rain forests, deserts, rivers, mountains, earthquakes, hurricanes, climate change, recycling,
public transport, bicycles, trains, airplanes, ships, bridges, skyscrapers, robots, artificial intelligence, computers,
the internet, encryption, databases, sorting algorithms, prime numbers, fractions, triangles, probability, statistics,
calculus, gravity, electricity, magnets, light, sound, atoms, DNA, cells, bacteria, the human heart, the brain, sleep,
dreams, memory, exercise, yoga, running, swimming, football, basketball, tennis, mountain climbing, camping, fishing,
photography, painting, sculpture, theatre, cinema, novels, poetry, mythology, religion, democracy, elections, money,
inflation, taxes, saving for retirement, starting a business, marketing, job interviews, remote work, leadership,
friendship, family, parenting, education, homework, libraries, museums, holidays, weddings, birthdays, fashion,
architecture, city planning, farming, water, oceans, stars, planets, comets, satellites, telescopes, time travel,
dragons, pirates, detectives, a lost letter, a lighthouse, a talking tree, an old clock, a secret garden, honesty,
courage, kindness, patience, freedom, justice, happiness, loneliness, healthy food, allergies, headaches, first aid,
pet care, house cleaning, moving to a new city, learning a language, playing the guitar, board games, video games,
nuclear energy, batteries, steam engines, microscopes, the periodic table, chemical bonds, enzymes, evolution, fossils,
glaciers, tides, clouds, thunderstorms, rainbows, the ozone layer, soil, insects, spiders, butterflies, elephants,
wolves, sharks, octopuses, migration of birds, mushrooms, trees, roses, spices, fermentation, nutrition, diabetes,
antibiotics, blood pressure, eye sight, hearing, stress, meditation, anxiety, habits, procrastination, time management,
public speaking, negotiation, teamwork, customer service, accounting, insurance, mortgages, the stock market, supply and
demand, globalization, trade, unemployment, unions, human rights, the constitution, the United Nations, the
Cold War, the
Industrial Revolution, the Middle Ages, the Vikings, the Aztecs, the Ottoman Empire, colonialism, slavery, the printing
of books, the invention of the wheel, the telephone, radio, television, social media, privacy, open source software,
machine learning, neural networks, recursion, linked lists, binary search, version control, unit tests, web servers,
mobile apps, spreadsheets, typography, logic, set theory, geometry, algebra, logarithms, vectors, matrices, negative
numbers, percentages, the number pi, paradoxes, ethics, utilitarianism, stoicism, existentialism, Buddhism, Islam,
Christianity, Greek tragedy, Shakespeare, fairy tales, science fiction, comics, opera, ballet, hip hop, the piano, the
violin, film music, dance, street art, pottery, knitting, woodworking, origami, hiking, skiing, surfing, cricket, the
Olympic Games, cycling, martial arts, travel on a budget, airports, hotels, camping stoves, maps, deserts at night, the
North Pole, islands, caves, lost cities, ghosts, robots that dream, a broken promise, an unexpected guest, a long winter
"""

ROLES = """\
nurse, farmer, lawyer, sailor, king, blacksmith, detective, student, retired teacher, software engineer, chef, painter,
young parent, musician, mayor, librarian, knight, astronaut, taxi driver, gardener, journalist, wizard, coach,
shopkeeper
"""
THINGS = """\
bicycle, book, lamp, pencil, phone, guitar, chair, bottle, ticket, apple, cake, camera, car, coat, computer, cup, desk,
door, flower, hammer, hat, jar, key, ladder, notebook, orange, picture, pillow, radio, ring, shirt, shoe, stamp, table,
toy, umbrella, wallet, watch, window, box
"""
NAMES = "Anna, Ben, Clara, David, Emma, Farid, Grace, Hiro, Ines, Jack, Kofi, Lena, Maya, Noah, Olga, Pedro, Sara, Yuki"
PLACES = """\
Paris, London, Tokyo, New York, Cairo, Nairobi, Lima, Berlin, Rome, Sydney, Toronto, Mumbai, Beijing, Istanbul, Athens,
Madrid, Chicago, Vienna, Mexico City, Seoul, Texas, Brazil, India, Greece, Norway, Kenya, Vietnam, Canada
"""
FOOD = """\
potatoes, rice, chicken, tomatoes, lentils, eggs, spinach, salmon, mushrooms, pasta, carrots, apples, tofu,
beans, onions,
cheese, bananas, oats, beef, peppers, pumpkin, lemons
"""
TASKS = """\
reverses a string, counts the words of a text, finds the largest number in a list, checks
whether a number is prime, computes the factorial of a number, sorts a list of names by length, merges two sorted lists,
counts how often each letter occurs, converts Celsius to Fahrenheit, reads a file and prints each line, computes the
average of a list, finds the second smallest number, checks whether two words are anagrams, generates a random password,
computes Fibonacci numbers, flattens a nested list, validates an email address, removes all vowels from a string, rolls
two dice, finds the common elements of two lists, adds two matrices, prints a multiplication table, computes the area of
a circle, rotates a list, finds the longest word in a sentence, sums the digits of a number, converts a number to binary
"""
TASKS2 = """\
read a JSON file, sort a dictionary by its values, make a request to a web page, plot a line, write to a log, parse a
date, handle an exception, copy a folder, iterate over two lists at once, format a number with two decimals,
connect to a
database, read arguments from the command line, filter a list, draw random samples, split a string, join paths
"""
PATTERNS = "a phone number, a date such as 2024-05-17, an email address, a postal code, a time of day, a web address"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.replace("\n", " ").split(",")]


WORDS = {
    "name": _words(NAMES),
    "place": _words(PLACES),
    "thing": _words(THINGS),
    "food": _words(FOOD),
    "task": _words(TASKS),
    "pattern": _words(PATTERNS),
}


ACTIONS, PEOPLE, TOPICS = _words(TASKS2), _words(ROLES), _words(SUBJECTS)


def _fill(request: str, rng: random.Random) -> str:
    """Fills the fields of a request. The field ``{}`` is a role after "a" or "every", otherwise a subject."""
    blanks = {kind: rng.sample(words, 3) for kind, words in WORDS.items()}
    fields = {f"{kind}{number or ''}": words[i] for kind, words in blanks.items() for i, number in enumerate((0, 2, 3))}
    fields |= {"task2": rng.choice(ACTIONS)}
    fields |= {"n": str(rng.randint(6, 60)), "m": str(rng.randint(2, 12)), "o": str(rng.randint(61, 400))}
    fields |= {"nn": str(rng.randint(20, 89))}
    roles, subjects = rng.sample(PEOPLE, 3), rng.sample(TOPICS, 3)
    filled = re.sub(r"(?<=\ba )\{\}|(?<=every )\{\}", lambda _: roles[0], request)
    for subject in subjects:
        filled = filled.replace("{}", subject, 1)
    return filled.format(**fields)


def prompts(count: int, seed: int = 0) -> list[str]:
    """Makes ``count`` different prompts, in random order."""
    rng = random.Random(seed)  # noqa: S311  # nothing secret
    found: dict[str, None] = {}
    while len(found) < count:
        found[_fill(rng.choice(REQUESTS), rng)] = None
    return list(found)


if __name__ == "__main__":
    print("\n".join(prompts(int(sys.argv[1]))))
