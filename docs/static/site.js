// A link into a folded part opens it, and so does printing.
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
