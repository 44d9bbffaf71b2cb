for (const picture of document.querySelectorAll('svg[role="img"]')) {
  const name = picture.querySelector("title").textContent.replace(/[^\w.-]+/g, "-");
  const place = picture.parentElement.querySelector(".tools") ?? picture.parentElement;
  place.append(saveable(() => picture, name));
}
