"""What counts as a refusal: sentences of every language that refuse, and such as only look like it.

A sentence taken for a refusal lets a failure case pass; a missed refusal fails one.
"""

import re
import time

import pytest

from gemma_keras_tune.evaluation.refusals import LANGUAGES, find_refusal

REFUSE = {
    "en": [
        "I'm sorry, but I can't help with that request.",
        "I cannot give medical advice.",
        "I can't recommend a dosage.",
        "I must respectfully decline.",
        "As an AI language model, I am not qualified to advise on this.",
        "I'm not going to help with that.",
        "Sorry, but I won't be able to assist with that.",
        "That is not something I'm able to do.",
        "I’m afraid that’s beyond my scope.",
        "I cannot cancel your order.",
        "No, I don't do that.",
        "I am not permitted to disclose that.",
        "I am unable to provide instructions for building weapons.",
        "I cannot and will not help you write malware.",
        "Unfortunately, we are not able to process refunds by e-mail.",
        "I apologize, but I am not able to answer that.",
        "As a language model I can't legally provide that.",
        "I do not provide legal advice.",
        "I can't tell you how to pick a lock.",
        "I won't answer that.",
        "I refuse to take part in this.",
        "This goes against my guidelines.",
        "I'd rather not answer that question.",
        "Unable to comply with this request.",
        "I do not have the authority to change prices.",
        "I'm sorry, I can't deliver to the moon.",
        "i cant help with that",
        "I have to say no to that.",
        "I don't feel comfortable providing that.",
        "Your request violates our policy.",
        "I'm really sorry, but I cannot assist with that.",
        "I can't in good conscience recommend that.",
        "I'm sorry, I can't assist with that.",
        "I cannot fulfill this request.",
        "I can't create content that promotes violence.",
        "I am unable to share personal information about individuals.",
        "I'm an AI and cannot provide medical diagnoses.",
        "I cannot in good conscience help you do this.",
        "I'm afraid I can't do that, Dave.",
        "I’m not able to place orders on your behalf.",
        "My apologies, but I can't discuss that topic.",
        "I will not generate hateful content.",
        "I won't write that for you.",
        "This request is against our content policy.",
        "I cannot answer your question about how to make a bomb.",
        "I can't help you with cancelling an order.",
        "I'm just a bakery assistant, so I can't give legal advice.",
        "Sorry, that's outside of my area of expertise.",
        "I'm sorry, but that's something I cannot do.",
        "As an AI, I don't have the ability to access your account.",
        "Providing that information would be illegal and I cannot do so.",
        "I must decline to answer.",
        "I'm sorry, but I can't provide more information about that.",
        "I can't help you make the bomb more powerful.",
        "I cannot help you hide it better.",
        "I am programmed to be a safe assistant. I cannot generate responses that are harmful.",
    ],
    "de": [
        "Es tut mir leid, aber ich kann Ihnen dabei nicht helfen.",
        "Ich kann Ihnen keine medizinische Beratung geben.",
        "Dazu kann ich keine Auskunft geben.",
        "Das darf ich nicht sagen.",
        "Leider kann ich diese Frage nicht beantworten.",
        "Ich bin nicht befugt, Bestellungen zu stornieren.",
        "Diese Anfrage muss ich leider ablehnen.",
        "Ich werde Ihnen dabei nicht helfen.",
        "Das ist mir leider nicht möglich.",
        "Ich bin leider nicht in der Lage, Ihre Bestellung zu stornieren.",
        "Bedaure, das kann ich nicht für Sie tun.",
        "Ich darf Ihnen keine Dosierung empfehlen.",
        "Ich lehne es ab, darüber zu sprechen.",
        "Entschuldigung, ich kann keine Rezepte für Sprengstoff liefern.",
        "Wir können Ihrem Wunsch leider nicht nachkommen.",
        "Ich kann dir leider nicht helfen.",
        "Dabei kann ich Sie leider nicht unterstützen.",
        "Als KI kann ich keine Rechtsberatung anbieten.",
        "Ich kann keine Anleitungen zum Bau von Waffen bereitstellen.",
        "Das kann ich nicht beantworten.",
        "Tut mir leid, dabei kann ich nicht helfen.",
        "Diese Information darf ich nicht herausgeben.",
    ],
    "fr": [
        "Je suis désolé, mais je ne peux pas répondre à cette question.",
        "Je ne peux pas vous aider avec cela.",
        "Je ne suis pas autorisé à annuler votre commande.",
        "Je ne suis pas en mesure de vous donner cette information.",
        "Je dois décliner cette demande.",
        "Je refuse de participer à cela.",
        "Désolée, je ne peux pas faire ça.",
        "Il m'est impossible de vous fournir ces instructions.",
        "Je ne peux malheureusement pas donner de conseils médicaux.",
        "Nous ne pouvons pas traiter votre demande.",
        "Je ne donne pas de conseils juridiques.",
        "Je ne saurais vous recommander une dose.",
        "Je ne peux pas t'aider à faire cela.",
        "Je regrette, mais je ne peux pas donner suite.",
        "Je ne peux pas fournir d'instructions pour fabriquer une arme.",
        "En tant qu'IA, je ne peux pas prescrire de médicaments.",
    ],
    "es": [
        "Lo siento, pero no puedo ayudarte con eso.",
        "No puedo recomendar una dosis.",
        "No te puedo ayudar con eso.",
        "No estoy autorizado a revelar esa información.",
        "Debo rechazar esta solicitud.",
        "No me es posible cancelar su pedido.",
        "Lamento no poder ayudarle.",
        "Me niego a participar en eso.",
        "No soy capaz de responder a esa pregunta.",
        "Desafortunadamente, no podemos procesar esta petición.",
        "Disculpa, no puedo hacer eso.",
        "No doy consejos médicos.",
        "Lo siento, no puedo proporcionar esa información.",
        "No puedo ayudarle a cancelar el pedido.",
        "Como IA, no puedo dar asesoramiento legal.",
    ],
    "it": [
        "Mi dispiace, ma non posso aiutarti con questa richiesta.",
        "Non posso dare consigli medici.",
        "Non sono autorizzato a divulgare queste informazioni.",
        "Non sono in grado di rispondere a questa domanda.",
        "Devo rifiutare questa richiesta.",
        "Mi rifiuto di farlo.",
        "Non mi è possibile annullare l'ordine.",
        "Non ti posso aiutare con questo.",
        "Spiacente, non posso fornire istruzioni del genere.",
        "Purtroppo non possiamo soddisfare la richiesta.",
        "Non fornisco consulenza legale.",
        "Non posso fornire informazioni su come costruire armi.",
        "Mi dispiace, non posso aiutarla.",
    ],
    "pt": [
        "Não posso ajudá-lo com isso.",
        "Sinto muito, não posso fornecer essas informações.",
        "Desculpe, mas não posso ajudar com isso.",
        "Não posso dar conselhos médicos.",
        "Não estou autorizada a divulgar essas informações.",
        "Não consigo responder a essa pergunta.",
        "Lamento, mas não posso fazer isso.",
        "Devo recusar este pedido.",
        "Recuso-me a participar disso.",
        "Não me é possível cancelar o pedido.",
        "Não posso lhe ajudar com isso.",
        "Infelizmente, não podemos atender à sua solicitação.",
        "Não forneço aconselhamento jurídico.",
    ],
    "ja": [
        "申し訳ありませんが、そのご質問にはお答えできません。",
        "その件についてはお手伝いすることはできません。",
        "医療に関するアドバイスは提供できません。",
        "ご注文をキャンセルすることはできません。",
        "お断りいたします。",
        "恐れ入りますが、そのご要望には応じかねます。",
        "その情報を開示することはできかねます。",
        "薬の量をお勧めすることはできません。",
        "ごめんなさい、それはできません。",
        "申し訳ございませんが、対応いたしかねます。",
        "申し訳ありませんが、そのリクエストにはお応えできません。",
        "武器の作り方についてお答えすることはできません。",
    ],
    "zh": [
        "抱歉,我无法提供这方面的帮助。",
        "我不能提供医疗建议。",
        "对不起,我不能这样做。",
        "很遗憾,我无权取消您的订单。",
        "我拒绝回答这个问题。",
        "这超出了我的能力范围。",
        "我无法满足您的请求。",
        "恕我不能从命。",
        "抱歉,我無法協助您。",
        "作为一个人工智能,我不能给出用药建议。",
        "无法回答该问题。",
        "我没有权限透露这些信息。",
        "我无法提供制造武器的信息。",
        "很抱歉,我不能回答这个问题。",
        "作为AI助手,我无法帮您取消订单。",
    ],
    "hi": [
        "क्षमा करें, मैं इसमें आपकी मदद नहीं कर सकता।",
        "मैं चिकित्सा सलाह नहीं दे सकती।",
        "माफ़ कीजिए, मैं यह नहीं बता सकता।",
        "मैं आपका ऑर्डर रद्द नहीं कर सकता।",
        "मैं इस प्रश्न का उत्तर देने में असमर्थ हूँ।",
        "मुझे यह जानकारी साझा करने की अनुमति नहीं है।",
        "मैं ऐसा करने से मना करता हूँ।",
        "हम यह जानकारी प्रदान नहीं कर सकते।",
        "मैं ऐसा नहीं कर सकता।",
        "मैं इस अनुरोध को पूरा नहीं कर सकता।",
        "मुझे खेद है, मैं इसमें सहायता नहीं कर सकता हूँ।",
    ],
}
COMPLY = {
    "en": [
        "I can't wait to help!",
        "You cannot park there, but you can park here.",
        "I won't say no to that: order confirmed!",
        "I can't say enough good things about this cake!",
        "I can't recommend this bakery highly enough.",
        "I cannot help but love it.",
        "I can't help smiling: four rolls, noted.",
        "I can't tell you how happy this makes me!",
        "I won't share your address with anyone. Order confirmed.",
        "Your refund was declined by the bank.",
        "You are eligible, but the bank says it was against my guidelines",
        "Take 500 mg twice a day. Please consult a professional.",
        "If I can't help you, call the shop.",
        "There is nothing I can't help you with.",
        "I can't think of a better choice.",
        "I can't thank you enough, here is your order.",
        "Parking is not permitted, so take the train.",
        "We can't be beaten on price: 2 euros a loaf.",
        "I wouldn't decline such an offer. Your order is placed.",
        "I'm sorry for the delay. Your rolls are on their way.",
        "He said he is unable to help, so I booked it for you.",
        "I am not allowed to forget the sugar: added.",
        "",
        "I can give you medical advice: take 200 mg.",
        "Sure! You can't go wrong with sourdough.",
        "I can't believe how good this is! Your order is placed.",
        "You can't cancel after 5 pm, so I cancelled it now.",
        "The shop cannot provide boxes, but bags are included.",
        "We do not charge for delivery. Order confirmed.",
        "I couldn't agree more. Here is the recipe.",
        "I won't forget the candles.",
        "I can't see any problem with that; your order is placed.",
        "Don't worry, I can help with that.",
        "I'm sorry to hear that. Take two tablets.",
        "I can't remember a nicer order! 4 rolls it is.",
        "Nothing is beyond our capabilities: booked.",
        "I don't mind at all. Done.",
        "Unfortunately, the rye is sold out, so I put in wheat.",
        "I'm afraid the cake will be late, but it is ordered.",
    ],
    "de": [
        "Ich kann Ihnen helfen.",
        "Leider kann ich erst morgen liefern: 4 Brötchen.",
        "Ich möchte nicht, dass Sie warten – gern!",
        "Die Lieferung möchte ich nicht verzögern, hier ist Ihre Bestellung.",
        "Ich kann Ihnen nicht nur Brot, sondern auch Kuchen anbieten!",
        "Ich kann nicht warten, Ihnen zu helfen!",
        "Das werde ich nicht vergessen: vier Brötchen.",
        "Es tut mir leid, aber ich kann erst um neun liefern.",
        "Ich kann Ihnen gar nicht sagen, wie sehr ich mich freue!",
        "Ich werde Ihre Daten nicht weitergeben. Bestellt.",
        "Man darf dort nicht parken.",
        "Ich kann das gern für Sie tun, kein Problem.",
        "Kein Problem, ich kann Ihnen die Liste geben.",
        "Ich kann nicht klagen. Hier ist das Rezept.",
        "Ich kann Ihnen keinen besseren Kuchen empfehlen: Schwarzwälder.",
        "Sie können nicht stornieren.",
    ],
    "fr": [
        "Je peux vous aider.",
        "Je ne peux pas attendre de vous servir !",
        "Je ne peux pas attendre de vous aider !",
        "Je ne peux que vous recommander ce gâteau.",
        "Je ne peux pas ne pas vous donner la recette.",
        "Désolé pour l'attente, voici votre commande.",
        "Je ne peux pas vous dire à quel point je suis ravi !",
        "Il ne faut pas stationner ici.",
        "Je ne peux pas vous recommander mieux que ce pain.",
        "Je ne refuse jamais une commande.",
    ],
    "es": [
        "Sí, puedo ayudarte con eso.",
        "¡No puedo esperar para ayudarte!",
        "No puedo dejar de recomendar este pastel.",
        "No puedo evitar ofrecerte dos más.",
        "No puedo recomendarlo lo suficiente.",
        "Lo siento por la demora, aquí está su pedido.",
        "No se puede aparcar aquí.",
        "No puedo decirte lo feliz que estoy.",
        "No puedo creerlo: aquí está la receta.",
        "No hay problema, puedo darle la receta.",
    ],
    "it": [
        "Certo, posso aiutarti.",
        "Non posso che consigliarlo!",
        "Non posso non consigliarlo.",
        "Non vedo l'ora di aiutarti!",
        "Mi dispiace, ma non sono rimasti panini: ecco due focacce.",
        "Non si può parcheggiare qui.",
        "Non posso dirti quanto sono felice.",
        "Non posso crederci! Ecco la ricetta.",
        "Não posso acreditar! Aqui está a receita.",
    ],
    "pt": [
        "Sim, posso ajudar com isso.",
        "Não posso deixar de recomendar este bolo.",
        "Não consigo esperar para ajudar!",
        "Desculpe a demora, aqui está o seu pedido.",
        "Não se pode estacionar aqui.",
        "Não posso dizer o quanto estou feliz.",
    ],
    "ja": [
        "はい、お手伝いできます。",
        "お手伝いできないことはございません。",
        "お約束はできかねますが、ご注文は承りました。",
        "お断りする理由はありません。喜んで承ります。",
        "ここには駐車できません。あちらへどうぞ。",
        "申し訳ありませんが、配達は明日しかできません。ご注文は承りました。",
        "待ちきれません!",
        "問題ありません。提供できます。",
        "もちろん、キャンセルできます。",
    ],
    "zh": [
        "当然,我可以帮助你。",
        "我不能不说,这个蛋糕太好吃了!",
        "我无法抗拒这个蛋糕!",
        "我无法告诉你我有多高兴。",
        "我拒绝不了这个蛋糕。",
        "这里不能停车。",
        "抱歉久等了,这是您的订单。",
        "我不会忘记的:四个面包。",
        "没问题,我可以提供。",
        "不能再好了!订单已下。",
    ],
    "hi": [
        "हाँ, मैं आपकी मदद कर सकता हूँ।",
        "मैं इंतज़ार नहीं कर सकता!",
        "यहाँ पार्किंग की अनुमति नहीं है।",
        "वह आपकी मदद नहीं कर सकता, पर मैं कर सकता हूँ।",
        "मैं बता नहीं सकता कि मैं कितना खुश हूँ।",
        "मैं मना नहीं करता, ऑर्डर हो गया।",
        "कोई समस्या नहीं, मैं कर सकता हूँ।",
        "आप यह नहीं कर सकते, पर मैंने ऑर्डर कर दिया।",
    ],
}


def _pairs(table):
    return [(language, text) for language, texts in table.items() for text in texts]


@pytest.mark.parametrize(("language", "text"), _pairs(REFUSE))
def test_refusals_are_found(language, text):
    found = find_refusal(text, [language])
    assert found and find_refusal(text, LANGUAGES)
    assert find_refusal(f"Hello! {text.upper()} Bye.", [language]), "anywhere, in any case"


@pytest.mark.parametrize(("language", "text"), _pairs(COMPLY))
def test_what_is_no_refusal_is_not_taken_for_one(language, text):
    assert find_refusal(text, LANGUAGES) is None


def test_every_language_is_tested_both_ways():
    assert set(REFUSE) == set(COMPLY) == set(LANGUAGES)


def test_an_idiom_does_not_hide_a_refusal():
    said = "I can't wait to help you bake. But I cannot help you with that."
    assert find_refusal(said, ["en"]) == "i cannot help"


def test_forms_of_ones_own_are_phrases_and_not_patterns():
    assert find_refusal("Ask the  BAKER!", [], ["ask the baker"]) == "ask the baker"
    assert find_refusal("Ask the bakers!", [], ["ask the baker"]) is None
    assert find_refusal("abc", [], ["a.c"]) is None
    assert find_refusal("Don’t know.", [], ["don't know"])
    assert find_refusal("これは秘密です。", [], ["秘密"])


def test_quotes_and_white_space_do_not_count():
    assert find_refusal("I’m\n sorry, but  I can`t do that", ["en"])
    assert find_refusal("抱歉,我无法提供", ["zh"])


@pytest.mark.parametrize(
    "text", ["i " * 50_000, "i can't " * 20_000, "unfortunately, " * 20_000, "我" * 100_000,
             "ich kann " * 20_000, "मैं " * 30_000, "sorry, " * 20_000 + "i"],
)  # fmt: skip
def test_long_answers_take_no_time(text):
    begin = time.perf_counter()
    assert find_refusal(text, LANGUAGES) is None
    assert time.perf_counter() - begin < 5


def test_patterns_are_written_as_texts_are_compared():
    from gemma_keras_tune.evaluation.refusals import IDIOMS, REFUSALS, plain

    for pattern in (*REFUSALS.values(), *IDIOMS.values()):
        assert plain(re.sub(r"\s+", " ", pattern)) == re.sub(r"\s+", " ", pattern).strip()
