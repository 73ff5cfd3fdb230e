"""Support tickets with labelled personal data, made from templates: 240 to train, 80 to measure.

python examples/support_tickets.py tickets.jsonl unseen.jsonl

People, places and sentences of the second file are not in the first.
"""

import json
import random
import sys
from pathlib import Path
from string import Formatter

PEOPLE = (
    "Amelia Osei", "Ben Carter", "Chiara Rossi", "Dmitri Volkov", "Elif Kaya", "Fatima Haddad",
    "George Papas", "Hana Sato", "Ivan Petrov", "Julia Nowak", "Kofi Mensah", "Lena Fischer",
    "Mateo Ruiz", "Nadia Rahman", "Oscar Lindqvist", "Priya Nair", "Quentin Moreau", "Rosa Silva",
    "Samuel O'Brien", "Tomasz Zielinski", "Ursula Meier", "Victor Chan", "Wendy Brooks",
    "Yusuf Demir", "Zoe Martin", "Aisha Bello", "Carlos Mendes", "Ingrid Holm", "Maria", "Peter",
    "Dr Anna Keller", "Tom", "Mrs Lopez", "Mr Okafor", "Sarah Jane Hill", "Li Wei",
)  # fmt: skip
STREETS = (
    "Oak Lane", "Station Road", "Hill Street", "Park Avenue", "Church Road", "Mill Lane",
    "River Drive", "Market Square", "Garden Way", "Castle Street", "Lake View", "Queens Road",
)  # fmt: skip
TOWNS = (
    "Leeds", "Austin", "Galway", "Porto", "Lyon", "Toronto", "Bergen", "Graz", "Denver", "Perth",
    "Bristol", "Ghent",
)  # fmt: skip
PROVIDERS = "example.com", "example.org", "mail.example", "post.example", "office.example"
PRODUCTS = (
    "coffee grinder", "garden swing", "Nova X2 headphones", "winter coat", "desk lamp",
    "bike helmet", "Orion tablet", "rain boots", "kettle", "phone case",
)  # fmt: skip
# A field in capitals is a label of the words that stand for it.
TICKETS = (
    "Hi, this is {PERSON}. My {product} from order {order} never arrived.",
    "Hello, my name is {PERSON} and I was charged twice. Please write to {EMAIL_ADDRESS}.",
    "Please call {PERSON} back at {PHONE_NUMBER}, it is about the {product}.",
    "I moved. My new address is {ADDRESS}. Can you update order {order}?",
    "The parcel went to {ADDRESS}, but I live at {ADDRESS}. What now? {PERSON}",
    "My email changed to {EMAIL_ADDRESS}. The old one was {EMAIL_ADDRESS}.",
    "I spoke to {PERSON} on Monday, who promised a refund of {price}. Nothing has come.",
    "Can you send the invoice for {order} to {EMAIL_ADDRESS}? Thanks, {PERSON}",
    "Nobody answers {PHONE_NUMBER}. I have waited {days} days for the {product}.",
    "Deliver the {product} to {PERSON}, {ADDRESS}, and text {PHONE_NUMBER} before you come.",
    "{PERSON} here again. The {product} is still broken after {days} days!",
    "Regards,\n{PERSON}\n{ADDRESS}\n{PHONE_NUMBER}",
    "My wife {PERSON} ordered the {product} with her account {EMAIL_ADDRESS}.",
    "is {PHONE_NUMBER} still the right number for returns? mine is {PHONE_NUMBER}",
    "please cancel order {order} and confirm to {EMAIL_ADDRESS}, {PERSON}",
    "The {product} stopped working after {days} days. How do I return it?",
    "Where is my refund of {price} for order {order}?",
    "Does the {product} come in blue, and is it in stock?",
    "Your app shows error 5023 when I pay {price}. It worked in May.",
    "Thank you, the new {product} is great. Close ticket {order}.",
)
PEOPLE_UNSEEN = (
    "Greta Sorensen", "Hassan Ali", "Joanna Pike", "Luca Bianchi", "Mei Tanaka", "Noah Becker",
    "Olga Smirnova", "Paul", "Ms Chen", "Ruth Adeyemi", "Stefan Novak", "Valentina Cruz",
)  # fmt: skip
STREETS_UNSEEN = "Elm Street", "Bridge Road", "Harbour Lane", "Victoria Avenue", "Chapel Walk"
TOWNS_UNSEEN = "Lisbon", "Boston", "Cork", "Malmo", "Nantes"
TICKETS_UNSEEN = (
    "Good morning, {PERSON} speaking. I still wait for the {product}, order {order}.",
    "You can reach me at {EMAIL_ADDRESS} or on {PHONE_NUMBER}.",
    "Ship it to {ADDRESS} instead, {PERSON} will be at home.",
    "The driver left my {product} with {PERSON} next door. Is that how you deliver?",
    "Reset the password of {EMAIL_ADDRESS}, please. The account belongs to {PERSON}.",
    "I paid {price} for a {product} that lasted {days} days.",
    "What does delivery cost for two of the {product}?",
    "Ticket {order} again: no answer from {PHONE_NUMBER}. I want my {price} back. {PERSON}",
)


class Draw:
    """Draws tickets; the same seed draws the same."""

    def __init__(self, seed, people, streets, towns):
        self.random = random.Random(seed)
        self.people, self.streets, self.towns = people, streets, towns

    def ticket(self, template):
        """A text, and the characters of its personal data."""
        text, spans = "", []
        for literal, field, _, _ in Formatter().parse(template):
            text += literal
            if field is None:
                continue
            words = self.words(field)
            if field.isupper():
                spans.append({"start": len(text), "end": len(text) + len(words), "label": field})
            text += words
        return {"text": text, "spans": spans}

    def words(self, field):
        pick, digits = self.random.choice, self.digits
        match field:
            case "PERSON":
                return pick(self.people)
            case "EMAIL_ADDRESS":
                name = pick(self.people).lower().replace("'", "").split()
                return f"{pick('._-').join(name)}{pick(('', digits(2)))}@{pick(PROVIDERS)}"
            case "PHONE_NUMBER":
                return pick((
                    f"555-{digits(3)}-{digits(4)}", f"+44 20 7946 0{digits(3)}",
                    f"(555) {digits(3)} {digits(4)}", f"0555 {digits(3)} {digits(3)}",
                ))  # fmt: skip
            case "ADDRESS":
                number, street, town = (
                    self.random.randint(1, 200),
                    *map(pick, (self.streets, self.towns)),
                )
                return pick((f"{number} {street}, {town}", f"{number} {street}"))
            case "product":
                return pick(PRODUCTS)
            case "order":
                return pick(("A-", "#", "")) + digits(6)
            case "price":
                return pick(("$", "EUR ")) + f"{self.random.randint(5, 300)}.{digits(2)}"
            case _:
                return str(self.random.randint(2, 30))

    def digits(self, count):
        return "".join(self.random.choices("0123456789", k=count))


def write(path, draw, templates, count):
    tickets = [draw.ticket(templates[i % len(templates)]) for i in range(count)]
    Path(path).write_text("".join(json.dumps(ticket) + "\n" for ticket in tickets))


if __name__ == "__main__":
    _, training, unseen = sys.argv
    write(training, Draw(0, PEOPLE, STREETS, TOWNS), TICKETS, 240)
    write(unseen, Draw(1, PEOPLE_UNSEEN, STREETS_UNSEEN, TOWNS_UNSEEN), TICKETS_UNSEEN, 80)
