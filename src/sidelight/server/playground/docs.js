// The API's reference, by Swagger UI; the key is the playground's, kept in this tab.

const form = document.querySelector("#key-form"), field = document.querySelector("#key");

function withKey(request) {
  const key = sessionStorage.getItem("sidelight-key");
  if (key) request.headers.Authorization = `Bearer ${key}`;
  return request;
}

async function show() {
  const { headers } = withKey({ headers: {} });
  const answer = await fetch("openapi.json", { headers });
  form.hidden = answer.ok;
  if (!answer.ok) return field.focus();
  window.SwaggerUIBundle({
    spec: await answer.json(), domNode: document.querySelector("#reference"),
    requestInterceptor: withKey, validatorUrl: null,
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("sidelight-key", field.value.trim());
  show();
});
show();
