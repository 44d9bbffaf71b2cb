for (const picture of document.querySelectorAll('svg[role="img"]')) {
  const name = picture.querySelector("title").textContent.replace(/[^\w.-]+/g, "-");
  const place = picture.parentElement.querySelector(".tools") ?? picture.parentElement;
  place.append(saveable(() => picture, name));
}

// What is wider than the screen can be scrolled by the keyboard, too.
const wide = () => {
  for (const figure of document.querySelectorAll("figure")) {
    if (figure.scrollWidth > figure.clientWidth) figure.tabIndex = 0;
    else figure.removeAttribute("tabindex");
  }
};
addEventListener("resize", wide);
wide();
