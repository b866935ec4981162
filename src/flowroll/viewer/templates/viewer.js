"use strict";
// One slider moves the film strips of all samples on the page; the arrow keys move it, wherever the focus is.
const slider = document.querySelector("[data-slider]");
const strips = [...document.querySelectorAll("[data-strip]")].map((strip) => ({
  buttons: [...strip.querySelectorAll("[data-step]")],
  large: strip.querySelector("[data-large]"),
  caption: strip.querySelector("[data-caption]"),
}));
const places = [...new Set(strips.flatMap((strip) => strip.buttons.map((button) => button.dataset.step)))].sort(
  (one, other) => (one === "end") - (other === "end") || one - other,
);

function show(place) {
  slider.value = place;
  for (const { buttons, large, caption } of strips) {
    const chosen = buttons.find((button) => button.dataset.step === places[place]);
    if (!chosen) continue;
    for (const button of buttons) button.setAttribute("aria-pressed", button === chosen);
    large.src = chosen.querySelector("img").src;
    caption.textContent = chosen.title;
    const film = chosen.closest(".film");
    film.scrollLeft = chosen.offsetLeft - film.offsetLeft - film.clientWidth / 2;
  }
  for (const row of document.querySelectorAll("[data-row]")) row.setAttribute("aria-current", row.dataset.row === places[place]);
}

if (slider) {
  if (places.length < 2) {
    slider.closest("label").hidden = true;
  } else {
    slider.max = places.length - 1;
    slider.value = slider.max;
    slider.addEventListener("input", () => show(Number(slider.value)));
    for (const { buttons } of strips)
      for (const button of buttons) button.addEventListener("click", () => show(places.indexOf(button.dataset.step)));
  }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (turn && slider && places.length > 1) {
    event.preventDefault();
    show(Math.min(Math.max(Number(slider.value) + turn, 0), places.length - 1));
  }
  const link = { n: "next", p: "prev" }[event.key];
  if (link) document.querySelector(`a[rel=${link}]`)?.click();
});

// No more can be ticked than can stand side by side.
const form = document.querySelector("[data-compare]");
form?.addEventListener("change", () => {
  const boxes = [...form.querySelectorAll("input[name=sample]")];
  const isFull = boxes.filter((box) => box.checked).length >= Number(form.dataset.compare);
  for (const box of boxes) box.disabled = isFull && !box.checked;
});
