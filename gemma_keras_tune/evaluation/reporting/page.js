"use strict";
(() => {
  const form = document.querySelector("form.filters");
  const cases = [...document.querySelectorAll("details.case")];
  const none = document.querySelector("p.none");
  const checked = (name) =>
    new Set([...form.querySelectorAll(`[name=${name}]:checked`)].map((box) => box.value));
  const texts = new Map();
  const has = (one, words) => {
    if (!words) return true;
    if (!texts.has(one)) texts.set(one, one.textContent.toLowerCase());
    return texts.get(one).includes(words);
  };
  const filter = () => {
    const kinds = checked("kind"), outcomes = checked("outcome");
    const change = form.elements.change ? form.elements.change.value : "";
    const words = form.elements.text.value.trim().toLowerCase();
    let shown = 0;
    for (const one of cases) {
      const { kind, outcome, change: changed } = one.dataset;
      const fits = kinds.has(kind) && outcomes.has(outcome) &&
        (!change || change === changed) && has(one, words);
      one.hidden = !fits;
      shown += fits;
    }
    form.querySelector("output").value = `${shown} of ${cases.length} shown`;
    none.hidden = shown > 0;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  // Closed cases would print as their titles alone.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = cases.filter((one) => !one.open);
    closed.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((one) => { one.open = false; }));
  form.hidden = false;
  filter();
})();
