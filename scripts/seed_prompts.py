"""Writes seed prompts for distillation, one per line: many kinds of request, each about many subjects.

Usage: python scripts/seed_prompts.py COUNT > prompts.txt
"""

from __future__ import annotations

import random
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
Imagine you are an expert on {}. What would you tell a beginner?
Pretend to be a travel guide and tell me about {}.
You are a teacher. Explain {} to a child of ten years.
Act as a critic and review {}.
What are the advantages and disadvantages of {}?
Compare {} with {}.
Why do people care about {}?
What would happen if there were no more {}?
Is it true that {} can be dangerous? Explain your reasoning.
If {} cost 12 dollars and I buy 7, how much do I pay? Show each step.
A class of 24 students studies {}. A third of them leave. How many are left?
Make up a word problem about {} and solve it.
Write a Python function that has to do with {}.
Write a Python class that models {}.
Write an SQL query over a table about {}.
Explain how you would write a program that deals with {}.
Write HTML for a page about {}.
List the key facts about {} as bullet points.
Summarize what is known about {} in three sentences.
Give the names, places and dates that matter for {} as a table.
Make a JSON object that describes {}.
What questions should I ask to learn about {}?
Explain the science behind {}.
How does {} work?
What is the difference between {} and {}?
Describe the history of {}.
What did philosophers say about {}?
How has {} changed society?
Discuss the role of {} in literature and art.
What are the ethical questions about {}?
Give me ten tips about {}.
Make a plan for a week to learn about {}.
How do I get started with {}?
What are common mistakes with {}, and how can I avoid them?
Write a speech about {}.
Write a song about {}.
Give me a recipe that has to do with {}.
Rewrite this in a more formal tone: we really need to talk about {}.
Correct the grammar: she have told me everything of {} yesterday.
Translate to Spanish: I would like to know more about {}.
Classify these as good or bad news and say why: there is more {} than ever.
Write five trivia questions with answers about {}.
What is {}?
Tell me about {}.
Can you help me understand {}?
I am worried about {}. What should I do?
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
pet care, house cleaning, moving to a new city, learning a language, playing the guitar, board games, video games
"""


def prompts(count: int, seed: int = 0) -> list[str]:
    """Different prompts, in random order."""
    rng = random.Random(seed)  # noqa: S311  # nothing secret
    subjects = [subject.strip() for subject in SUBJECTS.replace("\n", " ").split(",")]
    found: dict[str, None] = {}
    while len(found) < count:
        request = rng.choice(REQUESTS)
        found[request.format(*rng.sample(subjects, request.count("{}")))] = None
    return list(found)


if __name__ == "__main__":
    print("\n".join(prompts(int(sys.argv[1]))))
