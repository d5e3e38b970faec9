"""Texts with personal data planted in them, and texts without: what `data.scrub` is measured on.

By the same author as the recognisers, so that strangers' texts may do worse: of the second set of names and sentences ("Since {} left")
86 % were found when it was first tried, and the dictionary was added for it. All persons, addresses and numbers are made up.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

NAMES = (
    """
Martha Okonkwo|Dmitri Volkov|Aiko Tanaka|Sven Lindqvist|Beatriz Carvalho|Hyun-woo Seo|Tomasz Wiśniewski
Fatima Al-Sayed|Liam O'Connor|Chen Xiaoming|Ingrid Haugen|Rajesh Subramanian|Chloé Lefèvre|Pablo Echeverría
Yusuf Demir|Kwame Boateng|Oksana Shevchenko|Park Ji-hoon|Gareth Llewellyn|Noor van Dijk|Samantha Brightwell
Matteo Ricci|Leila Haddad|Jürgen Schäfer|Nguyen Van Minh|Thabo Nkosi|Harriet Pemberton|Siobhan Kelly|Andrés Villanueva
Choi Eun-bi|Emily Carter|James Whitfield|Robert Nakamura|Anna Kowalczyk|Priyanka Deshmukh|Daniel Rosenberg
Grace Muthoni|Viktor Horváth|Elena Popescu|Marcus Bell|Sarah|Mehmet|Ludmila|Jamal|Ingeborg|Haruto|Deepika|Sebastian
Fiona|Kenji|Abigail Thornbury|Nnamdi Eze|Pia Lindholm|Takumi Ishikawa|Zsófia Kertész|Rohan Iyer|Camille Dubois
Esteban Rojas|Elif Yıldız|Kofi Asante|Halyna Kravets|Shin Dong-hyun|Owen Pritchard|Femke Bakker|Tyler Brooks
Lucia Ferrara|Karim Benali|Uwe Zimmermann|Le Thi Hoa|Lindiwe Mokoena|Georgina Ashdown|Aoife Doyle|Ramón Ibáñez
Yoon Seo-yeon|Rachel Adams|Brian Foster|Mei Lin|Dorota Wójcik|Sanjay Patel|Hannah Weiss|Ruth|Ahmet|Galina|Tyrone|Heidi
Ren|Ananya|Tobias|Bridget|Daichi|Philippa Marsh|Chidi Okafor|Henrik Solberg|Naoko Fujimoto|Bence Szabó|Kavya Menon
Manon Girard|Rodrigo Fuentes|Zeynep Arslan|Abena Owusu|Taras Melnyk|Oh Se-hun|Rhiannon Parry|Joost de Boer
Cody Ramirez|Alessia Conti|Nadia Bouzid|Wolfgang Krüger|Pham Quoc Bao|Themba Zulu|Rosalind Fairfax|Ciarán Walsh
Lourdes Peña|Baek Ha-eun|Kevin Sanders|Monica Stewart|Zhang Wei|Marek Kaczmarek|Vikram Chauhan|Judith Klein|Oleg|Aoi
Babajide|Saoirse|Miguel|Thuy|Esra|Gunther|Neha|Claire
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

NAMED = r"""
Good morning, {} here, my card stopped working after the update.
You can reach my colleague {} for the invoice.
I already explained all of this to {} on the phone.
{} from the night shift restarted the server twice.
Our new administrator is called {}.
Kind regards,\n{}
The laptop belongs to {}, who is on leave until Friday.
Why can {} see my conversations?
Please change the owner of the project from {} to me.
As {} told me this morning, the quota is used up.
Hello, my name's {} and I need a new key.
I am {}, the one who called an hour ago.
Did {} approve the request?
Dear {}, thank you for your patience.
I share an office with {} and we both have the same error.
In the meeting {} said that we should roll back.
The contract was signed by {} in March.
My manager {} wants a report by noon.
It was {} who deleted the folder.
Send the summary to {} and to nobody else.
A customer, {}, complained about slow answers.
This is a message for {}: the training has finished.
I was told to ask for {} in the support team.
User: {}. Problem: cannot print.
Best,\n{}
Since {} left the company nobody answers my tickets.
We are waiting on {}.
Can I add {} to my plan?
{} is the person you need.
I gave the old badge to {}.
Yesterday's trainer was {}, I believe.
My daughter {} uses the same account.
The invoice should go to {}, not to me.
After lunch {} and we will test it.
Who is {} and why does she have access?
I found {}'s notes in the folder.
With greetings from Oslo, {}
Put it on {}'s desk.
signature: {}
This was {}'s idea.
Tomorrow {} flies to Madrid.
You may quote me: {}, head of sales.
Attn. {}
Nobody but {} knows the code.
{}: when will it be ready?
Apparently {} is on holiday this week.
The old password was chosen by {} years ago.
Between us, {} should not have that role.
Tell me whether {} has logged in today.
New starter: {}
We named the printer after {}.
If {} calls again, please hang up.
Two people can edit it: {} and me.
I would rather speak with {} than with a bot.
Invite {} to the channel.
No, not me. {} did it.
Has {}'s trial ended?
Thank {} from me!
The parcel for {} came back.
In {}'s opinion the price is too high.
{} wants a refund.
Hey there, {} speaking, do you have a minute?
By order of {}
Where does {} live?
Everything was fine until {} changed the plan.
""".strip().splitlines()

KOREAN_NAMED = """
안녕하세요, 저는 김서연입니다. 비밀번호를 잊어버렸어요.
제 이름은 박도윤이고 어제 가입했습니다.
이준호 씨에게 전달해 주세요.
담당자: 최은지
정하늘 님, 문의해 주셔서 감사합니다.
예금주는 강민재입니다.
조현우 과장님이 승인하셨습니다.
고객명: 윤지아, 주문이 오지 않았습니다.
장우진 대리한테 물어보세요.
임수빈 고객님의 계정이 잠겼습니다.
""".strip().splitlines()
KOREAN_NAMES = ["김서연", "박도윤", "이준호", "최은지", "정하늘", "강민재", "조현우", "윤지아", "장우진", "임수빈"]

MAILS = [
    "martha.okonkwo@example.com",
    "dvolkov@mail.example.org",
    "a.tanaka+support@example.co.jp",
    "sven_l@example.se",
    "b-carvalho@dept.example.com.br",
    "hwseo@example.ac.kr",
    "t.wisniewski@example.pl",
    "fatima@xn--bcher-kva.example",
    "LIAM@EXAMPLE.IE",
    "x1.chen@sub.sub.example.cn",
    "info.haugen@example.museum",
    "rajesh99@example.in",
    "chloe.lefevre@example.fr",
    "p.echeverria@example.travel",
    "yusuf%demir@example.com.tr",
    "kb@example.gh",
    "1234567@example.com",
    "oksana.s@example.io",
    "jihoon_park@example.kr",
    "g@example.wales",
]
MAILED = """
Write to {} if anything is unclear.
My address is {}.
I never got the mail, is {} the right one?
Account: {}
Bitte an {} senden.
제 이메일은 {}입니다.
Reset the password of <{}> please.
(cc: {}, urgent)
""".strip().splitlines()

PHONES = (
    """
010-3921-4478|010 2847 5512|01087361249|+82 10-5523-9081|+82-2-738-4417|02-2146-8830|031-228-5174|051 463 7720
+821047382910|010.4482.1937|(415) 555-2671|+1 415-555-2671|212-555-7834|646.555.0198|+1 (312) 555 0147|3105550172
+44 20 7946 0958|020 7946 0321|07700 900461|+44 7911 123456|+49 30 901820|030 90298213|+49 151 23456789|0151 23456789
+33 1 42 68 53 00|01 42 68 53 00|+33 6 12 34 56 78|+34 612 345 678|+39 06 6982 1234|+31 20 123 4567|+81 3-3224-5111
03-3224-9876|+91 98765 43210|098765 43211|+61 2 9374 4000|+55 11 91234-5678|+86 138 0013 8000|+46 8 123 456 78
+48 22 123 45 67|+90 212 555 12 34
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
PHONED = """
Call me back on {} after five.
My number is {}, thanks.
Phone: {}
You can text {} any time.
전화번호는 {}입니다.
It rings at {} but nobody answers.
연락처 {} 로 전화 주세요.
Is {} still the hotline of the office?
""".strip().splitlines()

CARDED = """
I paid with {} last night.
Card number {}, valid until 04/29.
카드번호는 {}입니다.
Please remove {} from my account.
It says that {} was declined.
Visa {}
I paid with {} 12/27 and nothing happened.
Charge {} 123 please.
My card: {} 04 29 737
Order 4711 was paid with {} 1234.
""".strip().splitlines()

RESIDENT = """
제 주민등록번호는 {}입니다.
주민번호 {} 로 조회해 주세요.
My Korean resident number is {}.
RRN: {}
The form wants {} and my address.
({})
""".strip().splitlines()

CLEAN = """
How do I restart the engine after an update?
Run python -m serve rollback helpdesk and wait two seconds.
The port 8000 listens on 127.0.0.1 alone.
Version 4 was registered on 2026-11-20 at 14:05:33.
Training took 507 s on two cores and used 5.6 GiB.
The answer to question 42 is in chapter 7.
Set train.lora.rank=32 and train.learning_rate=2.0e-4.
My order 20261120-4471 has not arrived.
Why is the loss 0.6931471805599453 at the first step?
Does it run on Windows or only on Linux?
The meeting is on Tuesday in Berlin.
I am sure that it worked yesterday.
This is great, thanks!
Is there a tool that exports to Excel?
Our office in New York is closed in August.
The hash is 3f786850e387550fdab836ed7e6dc881de23001b.
I'm not able to log in since Monday.
Please send the report as PDF.
MLflow and Prometheus both want a port.
Hello, can you help me with my password?
The GPU has 32607 MiB of memory, driver 570.86.16.
Add 15 % and divide by 3.14159.
비밀번호를 어떻게 바꾸나요?
서버를 다시 시작하려면 어떻게 하나요?
배송은 보통 3일에서 5일 정도 걸립니다.
감사합니다. 문제가 해결되었습니다.
What does error 0x80070057 mean?
Use the API with an HTTP header and JSON.
Thank you so much for the quick answer.
Where do I find the invoice of October?
I tried Firefox and Chrome, both fail.
The batch size is 16, the sequence length 2048.
My subscription ends on 31 December 2026.
Can the chatbot answer in German?
Serial number 4711-0815-2222, is it under warranty?
Ask the administrator for a key.
The session id is 7c9e6679-7425-40de-944b-e07fc1f90ae7.
We need 12,500 licences for 250 users.
Click on Settings, then on Security.
The second card trains while the first one answers.
""".strip().splitlines()


@dataclass(frozen=True)
class Planted:
    """A text, and the personal data in it."""

    kind: str
    text: str
    value: str

    @property
    def start(self) -> int:
        """Where the value begins."""
        return self.text.index(self.value)


def planted() -> Iterator[Planted]:
    """Yield all planted items; the same ones each time."""
    yield from _fill("PERSON", NAMES * 2, NAMED)
    yield from (Planted("PERSON_KO", text, name) for text, name in zip(KOREAN_NAMED, KOREAN_NAMES, strict=True))
    yield from _fill("EMAIL", MAILS * 2, MAILED)
    yield from _fill("PHONE", PHONES, PHONED)
    yield from _fill("CARD", list(_cards()), CARDED)
    yield from _fill("KR_RRN", list(_resident_numbers()), RESIDENT)


def _fill(kind: str, values: list[str], texts: list[str]) -> Iterator[Planted]:
    order = random.Random(f"planted {kind}")
    values = order.sample(values, len(values))
    for value, text in zip(values, cycle(texts), strict=False):
        yield Planted(kind, text.replace("\\n", "\n").replace("{}", value), value)


def _cards(count: int = 36) -> Iterator[str]:
    """Numbers with a right check digit, written in three ways."""
    order = random.Random("cards")
    for number, (prefix, length) in zip(range(count), cycle([("4", 16), ("52", 16), ("37", 15), ("6011", 16), ("2221", 16)]), strict=False):
        body = prefix + "".join(str(order.randrange(10)) for _ in range(length - 1 - len(prefix)))
        digits = body + str(-sum(_luhn(body)) % 10)
        groups = [digits[:4], digits[4:10], digits[10:]] if length == 15 else [digits[at : at + 4] for at in range(0, 16, 4)]
        yield ("", " ", "-")[number % 3].join(groups)


def _luhn(body: str) -> Iterator[int]:
    for place, letter in enumerate(reversed(body)):
        doubled = int(letter) * (2 if place % 2 == 0 else 1)
        yield doubled - 9 if doubled > 9 else doubled


def _resident_numbers(count: int = 36) -> Iterator[str]:
    """Half with the check digit that was the rule until 2020, half random; with dash, without, with a space, and partly foreigners'."""
    order = random.Random("resident numbers")
    for number in range(count):
        body = f"{order.randrange(40, 99)}{order.randrange(1, 13):02}{order.randrange(1, 29):02}{1 + number % 2 + 4 * (number % 6 == 5)}"
        body += f"{order.randrange(0, 90):02}{order.randrange(1000):03}"
        check = (11 - sum(int(digit) * weight for digit, weight in zip(body, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5), strict=True)) % 11) % 10
        digits = body + str(check if number % 2 else order.randrange(10))
        yield digits[:6] + ("-", "", "-", " - ")[number % 4] + digits[6:]
