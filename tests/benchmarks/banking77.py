"""Accuracy on banking77: 77 intents of customers, learnt from 10 rows each.

    python tests/benchmarks/banking77.py [--json FILE] [--rows-a-class 10] [--seed 0]
                                         [--test-rows 3080] [--validation]

The recipe. Every class gets one word that is a single token of Gemma's vocabulary, and the model
learns to write it after the query; that is all there is to a pair. So a class is told by the logits
of 77 tokens at one place, which takes one pass over the query, and no class is favoured because its
name is short. LoRA is on all linear layers. `--models 2` tunes two, with different seeds, and
multiplies their probabilities. `--validation` measures on training rows that were not tuned on:
settings are for choosing there, never on the test split.

The rows are drawn by the seed from the training split of `../shared/data/banking77` (PolyAI,
Casanueva et al. 2020, CC-BY-4.0). `accuracy` is over all rows of the test split, or the first
`--test-rows` of it in an order drawn by the seed; `interval` is Wilson's, at 95 %.
"""

import argparse
import collections
import csv
import pathlib
import random
import time

import _bench
import keras
import numpy as np

import gemma_keras_tune as gkt
from gemma_keras_tune.evaluation.statistics import wilson_interval
from gemma_keras_tune.gemma.templates import Segment
from gemma_keras_tune.generation.scoring import Scorer
from gemma_keras_tune.pairs import Message

TEMPLATE = "{prompt}\nTopic:{response}"
SETTINGS = dict(rank=16, alpha=16, learning_rate=1e-3, batch_size=16)
EPOCHS = 6
MODELS = 1

# Each with the space that comes before it.
WORDS = {
    "Refund_not_showing_up": "missing",
    "activate_my_card": "activate",
    "age_limit": "age",
    "apple_pay_or_google_pay": "apple",
    "atm_support": "ATM",
    "automatic_top_up": "automatic",
    "balance_not_updated_after_bank_transfer": "balance",
    "balance_not_updated_after_cheque_or_cash_deposit": "cash",
    "beneficiary_not_allowed": "beneficiary",
    "cancel_transfer": "cancel",
    "card_about_to_expire": "expire",
    "card_acceptance": "accepted",
    "card_arrival": "arrival",
    "card_delivery_estimate": "delivery",
    "card_linking": "link",
    "card_not_working": "broken",
    "card_payment_fee_charged": "fee",
    "card_payment_not_recognised": "unknown",
    "card_payment_wrong_exchange_rate": "conversion",
    "card_swallowed": "stuck",
    "cash_withdrawal_charge": "fees",
    "cash_withdrawal_not_recognised": "stolen",
    "change_pin": "change",
    "compromised_card": "fraud",
    "contactless_not_working": "contactless",
    "country_support": "countries",
    "declined_card_payment": "denied",
    "declined_cash_withdrawal": "refused",
    "declined_transfer": "declined",
    "direct_debit_payment_not_recognised": "debit",
    "disposable_card_limits": "maximum",
    "edit_personal_details": "details",
    "exchange_charge": "cost",
    "exchange_rate": "rate",
    "exchange_via_app": "exchange",
    "extra_charge_on_statement": "statement",
    "failed_transfer": "failed",
    "fiat_currency_support": "currencies",
    "get_disposable_virtual_card": "temporary",
    "get_physical_card": "PIN",
    "getting_spare_card": "another",
    "getting_virtual_card": "virtual",
    "lost_or_stolen_card": "lost",
    "lost_or_stolen_phone": "phone",
    "order_physical_card": "order",
    "passcode_forgotten": "password",
    "pending_card_payment": "payment",
    "pending_cash_withdrawal": "withdrawal",
    "pending_top_up": "pending",
    "pending_transfer": "waiting",
    "pin_blocked": "blocked",
    "receiving_money": "receive",
    "request_refund": "refund",
    "reverted_card_payment?": "returned",
    "supported_cards_and_currencies": "supported",
    "terminate_account": "close",
    "top_up_by_bank_transfer_charge": "deposit",
    "top_up_by_card_charge": "charge",
    "top_up_by_cash_or_cheque": "check",
    "top_up_failed": "fail",
    "top_up_limits": "limit",
    "top_up_reverted": "reverted",
    "topping_up_by_card": "add",
    "transaction_charged_twice": "twice",
    "transfer_fee_charged": "transfer",
    "transfer_into_account": "bank",
    "transfer_not_received_by_recipient": "recipient",
    "transfer_timing": "days",
    "unable_to_verify_identity": "unable",
    "verify_my_identity": "identity",
    "verify_source_of_funds": "source",
    "verify_top_up": "verify",
    "virtual_card_not_working": "error",
    "visa_or_mastercard": "visa",
    "why_verify_identity": "why",
    "wrong_amount_of_cash_received": "amount",
    "wrong_exchange_rate_for_cash_withdrawal": "abroad",
}

Rows = list[tuple[str, str]]


def main() -> None:
    options = _options()
    train, validation = few_shot(read("train"), options.rows_a_class, options.seed)
    test = validation if options.validation else read("test")
    random.Random(options.seed).shuffle(test)
    test = test[: options.test_rows]
    begin = time.perf_counter()
    scores = np.zeros((len(test), len(WORDS)))
    for number in range(options.models):
        model = tuned(train, options.epochs, options.seed + number)
        scores += log_chances(model, [query for query, _ in test])
        found = [list(WORDS)[i] for i in scores.argmax(axis=1)]
        right = sum(a == b for a, (_, b) in zip(found, test, strict=True))
        seconds = time.perf_counter() - begin
        print(f"{number + 1} of {options.models} models: {right} of {len(test)}, {seconds:.0f} s",
              flush=True)  # fmt: skip
        del model
        _bench.forget()
    low, high = wilson_interval(right, len(test))
    _bench.report(
        f"banking77, {options.rows_a_class} rows a class, seed {options.seed}, "
        f"{'validation' if options.validation else 'test'} rows",
        [
            f"  {right} of {len(test)} right: {100 * right / len(test):.2f} % "
            f"(95 % interval {100 * low:.2f} to {100 * high:.2f} %)",
            f"  {len(train)} rows, {options.models} models, {options.epochs} epochs",
            f"  {seconds:.0f} s in all",
            *most_confused(found, test),
        ],
        {
            "accuracy": right / len(test),
            "interval": [low, high],
            "seconds": seconds,
            "rows": len(test),
            "training_rows": len(train),
            "rows_a_class": options.rows_a_class,
            "seed": options.seed,
            "split": "validation" if options.validation else "test",
            "epochs": options.epochs,
            "models": options.models,
        },
        options.json,
    )


def read(split: str) -> Rows:
    """Queries and their classes."""
    path = _bench.shared_data("banking77") / f"{split}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def few_shot(rows: Rows, rows_a_class: int, seed: int) -> tuple[Rows, Rows]:
    """Rows to tune on, and up to 20 others of each class to choose settings by."""
    by_class = collections.defaultdict(list)
    for query, category in rows:
        by_class[category].append((query, category))
    draw = random.Random(seed)
    train: Rows = []
    validation: Rows = []
    for category in sorted(by_class):
        own = by_class[category]
        draw.shuffle(own)
        train += own[:rows_a_class]
        validation += own[rows_a_class : rows_a_class + 20]
    return train, validation


def tuned(train: Rows, epochs: int, seed: int) -> keras.Model:
    """The model, tuned on queries and the words of their classes."""
    pairs = [(query, f" {WORDS[category]}") for query, category in train]
    plan = {**SETTINGS, "epochs": epochs, "seed": seed}
    return gkt.tune(_bench.MODEL, pairs, template=TEMPLATE, **plan).model


def log_chances(model: keras.Model, queries: list[str]) -> np.ndarray:
    """`[queries, classes]`: the logarithm of how likely the model finds the word of each class."""
    template = gkt.get_template(model, TEMPLATE)
    scorer = Scorer(model)
    words = [scorer.encoder.encode([Segment(f" {w}", True)])[0][1:] for w in WORDS.values()]
    assert all(len(ids) == 1 for ids in words), "a word is no single token"
    prompts = [
        scorer.encoder.encode(template.segments([Message("user", q)], generation_prompt=True))[0]
        for q in queries
    ]
    logits = scorer.next_logits(prompts, [int(ids[0]) for ids in words], batch_size=16)
    largest = logits.max(axis=1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))


def most_confused(found: list[str], test: Rows) -> list[str]:
    """The mistakes that were made most often."""
    mistakes = collections.Counter(
        (right, given) for given, (_, right) in zip(found, test, strict=True) if given != right
    )
    return [f"  {n:4d} x {right} taken for {given}" for (right, given), n in
            mistakes.most_common(5)]  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    parser.add_argument("--rows-a-class", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the rows, and of tuning")
    parser.add_argument("--test-rows", type=int, help="default: all")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--models", type=int, default=MODELS, help="tuned apart, asked together")
    parser.add_argument(
        "--validation", action="store_true", help="measure on other training rows, not the test's"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
