for (const part of document.querySelectorAll("[data-job]")) {
  const twins = document.querySelectorAll('[data-job="' + part.dataset.job + '"]');
  const mark = (on) => () => { for (const twin of twins) twin.classList.toggle("hot", on); };
  part.addEventListener("pointerenter", mark(true));
  part.addEventListener("pointerleave", mark(false));
}
