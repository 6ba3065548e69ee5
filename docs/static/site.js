// A link into a folded part opens it, and so does printing. Figures learn whether they are wide.
function open_around(element) {
  for (; element; element = element.parentElement) {
    if (element.tagName === "DETAILS") element.open = true;
  }
}

function follow() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target) {
    open_around(target);
    target.scrollIntoView();
  }
}

addEventListener("hashchange", follow);
addEventListener("DOMContentLoaded", follow);
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
addEventListener("load", () => {
  for (const image of document.querySelectorAll(".cell_output img")) {
    image.classList.toggle("wide", image.naturalWidth > 800);
  }
});
